"""What becomes of the candidates of each range: weighed, judged, and what the report and the caps need of them laid down."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.data.external_sort import read_between, write_rows
from sbp_fast.neighbors.merge import gathered, in_order, reach
from sbp_fast.neighbors.self_join import chance_weight
from sbp_fast.pairs.candidates import Candidates, sampled_pairs
from sbp_fast.pairs.criteria import FAULTLESS, FAULTS
from sbp_fast.pairs.tasks import WORK, Pairing
from sbp_fast.pipeline.executors.executor import Advance
from sbp_fast.pipeline.files import read_json, write_json

JUDGED = np.dtype([("first", "<i8"), ("second", "<i8"), ("score", "<f4"), ("fault", "i1")])
DIRECTED = np.dtype([("seed", "<i8"), ("partner", "<i8"), ("score", "<f4"), ("containment", "<f8")])
NEAREST = np.dtype([("document", "<i8"), ("similarity", "<f4")])
SAMPLED = np.dtype([("first", "<i8"), ("second", "<i8"), ("weight", "<f8")])


def write_sampled(pairing: Pairing) -> None:
    """Write the pairs that should be found, by their first document; after all ranges are gathered."""
    sample = sampled_pairs(pairing.documents, pairing.low, pairing.settings, pairing.config.seed)
    weight = chance_weight(sample.similarities, reach(pairing, sample.second))
    first, second = in_order(sample.first, sample.second)
    order = np.argsort(first, kind="stable")
    write_rows(_sampled_path(pairing), SAMPLED, first=first[order], second=second[order], weight=weight[order])


def _sampled_path(pairing: Pairing) -> Path:
    return pairing.directory / WORK / "sampled.npy"


def facts_path(pairing: Pairing, number: int) -> Path:
    """Where the counts of a judged range lie, written last."""
    return pairing.file("judged", number).with_suffix(".json")


def judge_range(pairing: Pairing, number: int, advance: Advance) -> None:
    """Write the candidates whose first document is in a range, as JUDGED in order of (first, second); those without a fault in
    both directions, as DIRECTED by seed; and the similarity of each document's nearest among them that may be paired with it,
    as NEAREST."""
    first, second, scores = gathered(pairing, number)
    candidates = Candidates.weigh(pairing.documents, first, second, pairing.low, scores)
    fault = candidates.judge(pairing.low, pairing.settings)
    write_rows(pairing.file("judged", number), JUDGED, first=first, second=second, score=scores, fault=fault)
    kept = fault == FAULTLESS
    _write_directed(pairing, number, *(part[kept] for part in (first, second, scores, candidates.containment)))
    documents, nearest = candidates.nearest_eligible(pairing.settings)
    write_rows(pairing.file("nearest", number), NEAREST, document=documents, similarity=nearest)
    wanted = read_between(_sampled_path(pairing), "first", *pairing.ranges[number])
    pairs = first * len(pairing.documents) + second
    found = np.isin(wanted["first"] * len(pairing.documents) + wanted["second"], pairs)
    facts: dict[str, float] = {"candidates": len(first), "found": int(found.sum())}
    facts["weight_found"] = float(wanted["weight"][found].sum())
    facts |= {name: int((fault == place).sum()) for place, name in enumerate(FAULTS)}
    write_json(facts_path(pairing, number), facts)  # last: it marks the range as judged
    advance(np.diff(pairing.ranges[number]).item())


def sum_facts(pairing: Pairing) -> Counter[str]:
    """Of all ranges: `candidates`, how many of them have each of `FAULTS` first, and of the sampled pairs `found` and
    `weight_found`."""
    total: Counter[str] = Counter()
    for number in range(len(pairing.ranges)):
        total.update(read_json(facts_path(pairing, number)))
    return total


def measured_recall(pairing: Pairing, facts: Counter[str]) -> dict[str, Any]:
    """Of the sampled pairs, how many are among the candidates, and of all pairs the share that this means."""
    sampled = np.load(_sampled_path(pairing))
    queries = min(pairing.settings.recall_queries, len(pairing.documents))
    share = facts["weight_found"] / float(sampled["weight"].sum()) if len(sampled) else 1.0
    return {"queries": queries, "pairs": len(sampled), "found": facts["found"], "recall": share}


def nearest_eligible(pairing: Pairing) -> np.ndarray:
    """Similarity of each document's nearest that is neither of its group nor a near-copy, where there is one. float32"""
    nearest = np.full(len(pairing.documents), -np.inf, dtype=np.float32)
    for number in range(len(pairing.ranges)):
        rows = np.load(pairing.file("nearest", number))
        nearest[rows["document"]] = np.maximum(nearest[rows["document"]], rows["similarity"])  # each document once
    return nearest[np.isfinite(nearest)]


def _write_directed(
    pairing: Pairing, number: int, first: np.ndarray, second: np.ndarray, scores: np.ndarray, containment: np.ndarray
) -> None:
    seeds, partners = np.append(first, second), np.append(second, first)
    scores, containment = np.tile(scores, 2), np.tile(containment, 2)
    order = np.argsort(seeds, kind="stable")
    columns = {"seed": seeds, "partner": partners, "score": scores, "containment": containment}
    write_rows(pairing.file("directed", number), DIRECTED, **{name: part[order] for name, part in columns.items()})
