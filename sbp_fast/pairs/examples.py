"""Examples of candidate pairs of every similarity, to read: where the band should begin is a judgement."""

from __future__ import annotations

import numpy as np

from sbp_fast.pairs.criteria import ACCEPTED, REJECT_REASONS
from sbp_fast.pairs.document_statistics import DistinctDocuments
from sbp_fast.pairs.tasks import Pairing
from sbp_fast.pipeline.files import write_json

EXAMPLES = "examples.json"
EDGES = np.linspace(0.0, 1.0, 21).round(2)
EXAMPLES_PER_BIN, SHOWN_CHARACTERS = 3, 240


def write_examples(pairing: Pairing) -> None:
    """Write `examples.json`: for each bin of similarity that has candidates, their number and a few of them.

    A bin is {"low", "high", "candidates", "accepted", "examples"}. An example is {"similarity", "reject_reason" (None if the
    pair qualifies), "first", "second"}, each of the last two an {"id", "text"} with the document's first characters. The same
    candidates give the same file.
    """
    counts = np.stack([_count(pairing, number) for number in range(len(pairing.ranges))])  # [ranges, (all, accepted), bins]
    bins = []
    for bin in np.flatnonzero(counts[:, 0].sum(axis=0)):
        ends = np.cumsum(counts[:, 0, bin])
        total = int(ends[-1])
        chosen = np.linspace(0, total - 1, min(EXAMPLES_PER_BIN, total)).astype(int)  # spread over the corpus
        ranges = np.searchsorted(ends, chosen, "right")
        rows = [
            _read_candidate(pairing, number, int(bin), index - (ends[number] - counts[number, 0, bin]))
            for number, index in zip(ranges.tolist(), chosen.tolist(), strict=True)
        ]
        bins.append(
            {
                "low": float(EDGES[bin]),
                "high": float(EDGES[bin + 1]),
                "candidates": total,
                "accepted": int(counts[:, 1, bin].sum()),
                "examples": [_example(pairing.documents, row) for row in rows],
            }
        )
    write_json(pairing.directory / EXAMPLES, bins)


def _bins(scores: np.ndarray) -> np.ndarray:
    return np.clip(np.digitize(scores, EDGES) - 1, 0, len(EDGES) - 2)


def _count(pairing: Pairing, number: int) -> np.ndarray:
    """Count the candidates of a range in each bin, and how many of them are accepted. int64 [2, bins]."""
    rows = np.load(pairing.file("scored", number), mmap_mode="r")
    bins = _bins(rows["score"])
    accepted = bins[rows["reject_reason"] == ACCEPTED]
    return np.stack([np.bincount(part, minlength=len(EDGES) - 1) for part in (bins, accepted)])


def _read_candidate(pairing: Pairing, number: int, bin: int, index: int) -> np.void:
    """Read the candidate of a range that is at `index` among those of its bin."""
    rows = np.load(pairing.file("scored", number), mmap_mode="r")
    return rows[np.flatnonzero(_bins(rows["score"]) == bin)[index]]


def _example(documents: DistinctDocuments, row: np.void) -> dict[str, object]:
    prepared, unique = documents.prepared, documents.prepared.unique
    ends = [int(documents.rows[row[end]]) for end in ("first", "second")]
    first, second = ({"id": unique.id(end), "text": prepared.text(unique, end)[:SHOWN_CHARACTERS]} for end in ends)
    reason = None if row["reject_reason"] == ACCEPTED else REJECT_REASONS[row["reject_reason"]]
    return {"similarity": float(row["score"]), "reject_reason": reason, "first": first, "second": second}
