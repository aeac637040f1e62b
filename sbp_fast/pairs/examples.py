"""Candidate pairs to read by eye, some of every similarity: where the band should begin is a judgement."""

from __future__ import annotations

import numpy as np

from sbp_fast.pairs.criteria import FAULTLESS, FAULTS
from sbp_fast.pairs.document_statistics import Documents
from sbp_fast.pairs.tasks import Pairing
from sbp_fast.pipeline.files import write_json

EXAMPLES = "examples.json"
EDGES = np.linspace(0.0, 1.0, 21).round(2)
PER_BIN, SHOWN = 3, 240  # examples of a bin, characters of a document


def write_examples(pairing: Pairing) -> None:
    """Write `examples.json`: for each bin of similarity that has candidates, how many there are and a few of them.

    A bin is {"low", "high", "candidates", "kept", "examples"}; an example is {"similarity", "fault" (None if the pair
    qualifies), "first", "second"}, each of the two an {"id", "text"} with the document's first characters. The same
    candidates give the same file.
    """
    counts = np.stack([_count(pairing, number) for number in range(len(pairing.ranges))])  # [ranges, candidates | kept, bins]
    found = []
    for bin in np.flatnonzero(counts[:, 0].sum(axis=0)):
        ends = np.cumsum(counts[:, 0, bin])
        total = int(ends[-1])
        chosen = np.linspace(0, total - 1, min(PER_BIN, total)).astype(int)  # spread over the corpus
        ranges = np.searchsorted(ends, chosen, "right")
        rows = [
            _member(pairing, number, int(bin), place - (ends[number] - counts[number, 0, bin]))
            for number, place in zip(ranges.tolist(), chosen.tolist(), strict=True)
        ]
        found.append(
            {
                "low": float(EDGES[bin]),
                "high": float(EDGES[bin + 1]),
                "candidates": total,
                "kept": int(counts[:, 1, bin].sum()),
                "examples": [_example(pairing.documents, row) for row in rows],
            }
        )
    write_json(pairing.directory / EXAMPLES, found)


def _bins(scores: np.ndarray) -> np.ndarray:
    return np.clip(np.digitize(scores, EDGES) - 1, 0, len(EDGES) - 2)


def _count(pairing: Pairing, number: int) -> np.ndarray:
    """How many candidates of a range fall into each bin, and how many of them are without a fault. int64 [2, bins]"""
    rows = np.load(pairing.file("judged", number), mmap_mode="r")
    bins = _bins(rows["score"])
    kept = bins[rows["fault"] == FAULTLESS]
    return np.stack([np.bincount(part, minlength=len(EDGES) - 1) for part in (bins, kept)])


def _member(pairing: Pairing, number: int, bin: int, place: int) -> np.void:
    """The candidate of a range that comes after `place` others of its bin."""
    rows = np.load(pairing.file("judged", number), mmap_mode="r")
    return rows[np.flatnonzero(_bins(rows["score"]) == bin)[place]]


def _example(documents: Documents, row: np.void) -> dict[str, object]:
    prepared, unique = documents.prepared, documents.prepared.unique
    ends = [int(documents.rows[row[end]]) for end in ("first", "second")]
    first, second = ({"id": unique.id(end), "text": prepared.text(unique, end)[:SHOWN]} for end in ends)
    fault = None if row["fault"] == FAULTLESS else FAULTS[row["fault"]]
    return {"similarity": float(row["score"]), "fault": fault, "first": first, "second": second}
