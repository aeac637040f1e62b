"""Scoring of the candidates of each range: measured, accepted or rejected, and written for the report and the caps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.data.external_sort import read_between, write_rows
from sbp_fast.neighbors.self_join import sampling_weight
from sbp_fast.pairs.candidates import Candidates, sample_pairs
from sbp_fast.pairs.criteria import ACCEPTED, REJECT_REASONS
from sbp_fast.pairs.gather import canonical_order, read_edges, read_reach
from sbp_fast.pairs.tasks import Pairing
from sbp_fast.pipeline.executors.executor import Advance
from sbp_fast.pipeline.files import save_array
from sbp_fast.pipeline.seals import marker_values, seal, write_marker

SCORED = np.dtype([("first", "<i8"), ("second", "<i8"), ("score", "<f4"), ("reject_reason", "i1")])
DIRECTED = np.dtype([("seed", "<i8"), ("partner", "<i8"), ("score", "<f4"), ("containment", "<f8")])
NEAREST = np.dtype([("document", "<i8"), ("similarity", "<f4")])
SAMPLED = np.dtype([("first", "<i8"), ("second", "<i8"), ("weight", "<f8")])


def write_recall_sample(pairing: Pairing) -> None:
    """Write the sampled pairs that should be found, by their first document; after all ranges are gathered."""
    sample = sample_pairs(pairing.documents, pairing.low, pairing.settings, pairing.config.seed)
    weight = sampling_weight(sample.similarities, read_reach(pairing, sample.second))
    first, second = canonical_order(sample.first, sample.second)
    order = np.argsort(first, kind="stable")
    write_rows(sample_path(pairing), SAMPLED, order, first=first, second=second, weight=weight)
    seal(sample_path(pairing))


def sample_path(pairing: Pairing) -> Path:
    """Return the path of the sampled pairs."""
    return pairing.scratch / "sampled.npy"


def counts_path(pairing: Pairing, number: int) -> Path:
    """Return the path of the counts of a scored range, which are written last."""
    return pairing.file("scored", number).with_suffix(".json")


def score_range(pairing: Pairing, number: int, advance: Advance) -> None:
    """Score the candidates whose first document is in a range.

    Writes all candidates as SCORED by (first, second); the accepted ones in both directions as DIRECTED by seed; and the
    similarity of each document's nearest eligible candidate as NEAREST.
    """
    first, second, scores = read_edges(pairing, number)
    candidates = Candidates.measure(pairing.documents, first, second, pairing.low, scores)
    reason = candidates.reject_reasons(pairing.low, pairing.settings)
    write_rows(pairing.file("scored", number), SCORED, first=first, second=second, score=scores, reject_reason=reason)
    accepted = reason == ACCEPTED
    _write_directed(pairing, number, *(part[accepted] for part in (first, second, scores, candidates.containment)))
    documents, nearest = candidates.nearest_eligible(pairing.settings)
    write_rows(pairing.file("nearest", number), NEAREST, document=documents, similarity=nearest)
    sampled = read_between(sample_path(pairing), "first", *pairing.ranges[number])
    pairs = first * len(pairing.documents) + second
    found = np.isin(sampled["first"] * len(pairing.documents) + sampled["second"], pairs)
    counts: dict[str, float] = {"candidates": len(first), "found": int(found.sum())}
    counts["weight_found"] = float(sampled["weight"][found].sum())
    counts |= {name: int((reason == index).sum()) for index, name in enumerate(REJECT_REASONS)}
    files = [pairing.file(kind, number) for kind in ("scored", "directed", "nearest")]
    write_marker(counts_path(pairing, number), files, **counts)  # last: the range is scored
    advance(np.diff(pairing.ranges[number]).item())


def total_counts(pairing: Pairing) -> Counter[str]:
    """Sum the counts of all ranges.

    Returns:
        `candidates`; under each of `REJECT_REASONS` the candidates that it rejects first; `found` and `weight_found` of the
        sampled pairs.
    """
    total: Counter[str] = Counter()
    for number in range(len(pairing.ranges)):
        total.update(marker_values(counts_path(pairing, number)))
    return total


def measure_recall(pairing: Pairing, counts: Counter[str]) -> dict[str, Any]:
    """Count the sampled pairs among the candidates, and estimate the share of all pairs that was found."""
    sampled = np.load(sample_path(pairing))
    queries = min(pairing.settings.recall_queries, len(pairing.documents))
    share = counts["weight_found"] / float(sampled["weight"].sum()) if len(sampled) else 1.0
    return {"queries": queries, "pairs": len(sampled), "found": counts["found"], "recall": share}


def nearest_eligible(pairing: Pairing) -> np.ndarray:
    """Similarity of each document's nearest that is neither of its group nor a near-duplicate, if it has one. float32."""
    nearest = np.full(len(pairing.documents), -np.inf, dtype=np.float32)
    for number in range(len(pairing.ranges)):
        rows = np.load(pairing.file("nearest", number))
        nearest[rows["document"]] = np.maximum(nearest[rows["document"]], rows["similarity"])  # each document once
    return nearest[np.isfinite(nearest)]


def _write_directed(
    pairing: Pairing, number: int, first: np.ndarray, second: np.ndarray, scores: np.ndarray, containment: np.ndarray
) -> None:
    order = np.argsort(np.append(first, second), kind="stable")
    rows = np.empty(2 * len(first), DIRECTED)
    columns = {"seed": (first, second), "partner": (second, first), "score": (scores,) * 2, "containment": (containment,) * 2}
    for name, halves in columns.items():  # one after the other: all sorted copies at once would be the stage's greatest memory
        rows[name] = np.concatenate(halves)[order]
    save_array(pairing.file("directed", number), rows)
