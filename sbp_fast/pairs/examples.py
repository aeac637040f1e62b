"""Candidate pairs to read by eye, some of every similarity: where the band should begin is a judgement."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.files import write_json
from sbp_fast.pairs.candidates import Candidates
from sbp_fast.pairs.documents import Documents
from sbp_fast.pairs.select import Verdict

EXAMPLES = "examples.json"
EDGES = np.linspace(0.0, 1.0, 21).round(2)
PER_BIN, SHOWN = 3, 240  # examples of a bin, characters of a document


def write_examples(
    directory: Path, prepared: PreparedCorpus, documents: Documents, candidates: Candidates, verdict: Verdict
) -> None:
    """Write `examples.json`: for each bin of similarity that has candidates, how many there are and a few of them.

    A bin is {"low", "high", "candidates", "kept", "examples"}; an example is {"similarity", "fault" (None if the pair
    qualifies), "first", "second"}, each of the two an {"id", "text"} with the document's first characters. The same
    candidates give the same file.
    """
    bins = np.clip(np.digitize(candidates.scores, EDGES) - 1, 0, len(EDGES) - 2)
    found = []
    for bin in np.unique(bins):
        members = np.flatnonzero(bins == bin)
        chosen = members[np.linspace(0, len(members) - 1, min(PER_BIN, len(members))).astype(int)]  # spread over the corpus
        found.append(
            {
                "low": float(EDGES[bin]),
                "high": float(EDGES[bin + 1]),
                "candidates": len(members),
                "kept": int(verdict.kept[members].sum()),
                "examples": [_example(prepared, documents, candidates, verdict, int(pair)) for pair in chosen],
            }
        )
    write_json(directory / EXAMPLES, found)


def _example(
    prepared: PreparedCorpus, documents: Documents, candidates: Candidates, verdict: Verdict, pair: int
) -> dict[str, object]:
    rows = [int(documents.rows[end[pair]]) for end in (candidates.first, candidates.second)]
    first, second = ({"id": str(prepared.unique.ids[row]), "text": prepared.text(prepared.unique, row)[:SHOWN]} for row in rows)
    fault = next((name for name, found in verdict.dropped.items() if found[pair]), None)
    return {"similarity": float(candidates.scores[pair]), "fault": fault, "first": first, "second": second}
