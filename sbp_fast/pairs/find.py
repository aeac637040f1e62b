"""The search for related pairs: neighbors of all documents, candidates, criteria and caps, in that order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import PairConfig, RunConfig
from sbp_fast.errors import UserError
from sbp_fast.neighbors.backends import BACKENDS
from sbp_fast.neighbors.vectors import similarities
from sbp_fast.pairs.caps import cap_degrees, taken_pairs, write_ranks
from sbp_fast.pairs.criteria import REJECT_REASONS, low_cut_off, random_pairs
from sbp_fast.pairs.document_statistics import DistinctDocuments
from sbp_fast.pairs.examples import write_examples
from sbp_fast.pairs.gather import gather
from sbp_fast.pairs.pairset import write_pairs
from sbp_fast.pairs.partitioned_self_join import search_partitions
from sbp_fast.pairs.score import (
    counts_path,
    measure_recall,
    nearest_eligible,
    sample_path,
    score_range,
    total_counts,
    write_recall_sample,
)
from sbp_fast.pairs.tasks import Pairing
from sbp_fast.pipeline.executors.executor import Advance, Holders, Workers
from sbp_fast.pipeline.finite import require_finite
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.seals import is_sealed, read_marker, remove_sealed

SIMILARITY_EDGES = np.linspace(-0.2, 1.0, 61).round(2)
CONTAINMENT_EDGES = np.linspace(0.0, 1.0, 21).round(2)

Checkpoint = Callable[[], object]


@dataclass(frozen=True)
class FoundPairs:
    """What the search for pairs took and found.

    Attributes:
        device: torch device of the searches.
        counts: for the manifest. `candidates`, `pairs` and `dropped` count ordered pairs, `duplicates` documents.
    """

    device: str
    counts: dict[str, Any]


def find_pairs(
    config: RunConfig,
    documents: DistinctDocuments,
    directory: Path,
    scratch: Path,
    *,
    workers: Workers,
    console: Console,
    checkpoint: Checkpoint,
) -> FoundPairs:
    """Find the related pairs among documents, and write them with examples and the list of duplicates.

    Args:
        config: its `pair`, `seed`, `device` and `threads`.
        documents: to pair.
        directory: for the pairs, examples, duplicates and indexes.
        scratch: for the files of the tasks; finished tasks are not done again.
        workers: that do the tasks.
        console: shows the progress.
        checkpoint: called after each task.

    Raises:
        UserError: no pair in the band, or `pair.target_recall` not reached.
    """
    duplicates = documents.duplicates.counts()
    left_out = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in duplicates.items())
    console.say(f"{len(documents)} documents, after {left_out}")
    random = similarities(documents.vectors, *random_pairs(documents.groups, np.random.default_rng(config.seed)))
    low, origin = _low(config.pair, random, console)
    require_finite({"low": low, "high": config.pair.similarity_high}, "similarity band of pair")
    with workers.hold(partial(Pairing, config, documents, low, directory, scratch, console), config) as holders:
        pairing = Pairing(config, documents, low, directory, scratch, console, holders.placement)
        search = search_partitions(pairing, holders, checkpoint)
        counts = _score(pairing, holders, checkpoint)
        nearest = nearest_eligible(pairing)
        if not counts["candidates"] - sum(counts[reason] for reason in REJECT_REASONS):
            raise _no_pairs(counts, nearest, low, config.pair)
        recall = measure_recall(pairing, counts)
        _check_recall(recall, search["partitions"], config.pair)
        _run(write_ranks, _unsealed(pairing.files("sizes")), holders, checkpoint)
        device = holders.placement.device if BACKENDS[search["backend"]].uses_device else "cpu"
    capped = cap_degrees(pairing)
    taken = _write_pairs(pairing)
    documents.duplicates.write(directory)
    write_examples(pairing)
    console.say(
        f"{taken['pairs']} pairs, {taken['seeds']} of {len(documents)} documents have a partner, "
        f"{recall['recall']:.4f} of the pairs in the band found"
    )
    return FoundPairs(
        device,
        {
            "documents": len(documents) + sum(duplicates.values()),
            "duplicates": duplicates,
            "pairs": taken["pairs"],
            "seeds": taken["seeds"],
            "band": {"low": low, "high": config.pair.similarity_high, "low_origin": origin},
            "random_pair_rate": float(np.mean(random >= low)),
            "self_join": search,
            "candidates": 2 * counts["candidates"],
            "dropped": {**{reason: 2 * counts[reason] for reason in REJECT_REASONS}, **capped},
            "recall": recall,
            **_histograms(nearest, random, taken),
        },
    )


def _score(pairing: Pairing, holders: Holders[Pairing], checkpoint: Checkpoint) -> Counter[str]:
    """Gather and score the candidates of all ranges; return the sums of their counts."""
    edges, scored = pairing.files("edges"), [counts_path(pairing, number) for number in range(len(pairing.ranges))]
    edges[0].parent.mkdir(exist_ok=True)
    unscored = [number for number, marker in enumerate(scored) if read_marker(marker) is None]
    if unscored or not is_sealed(sample_path(pairing)):
        _run(gather, _unsealed(edges), holders, checkpoint)
        write_recall_sample(pairing)
        with pairing.console.task("candidates scored", len(pairing.documents), "documents") as task:
            _run(score_range, unscored, holders, checkpoint, task.advance)
    for path in edges:  # as large as the scored candidates
        remove_sealed(path)
    return total_counts(pairing)


def _run(
    function: Callable[[Pairing, int, Advance], None],
    missing: Sequence[int],
    holders: Holders[Pairing],
    checkpoint: Checkpoint,
    advance: Advance = lambda amount: None,
) -> None:
    """Do the task of every range that misses its result."""
    for _ in holders.run(function, missing, advance):
        checkpoint()


def _unsealed(files: Sequence[Path]) -> list[int]:
    """Return the ranges whose last file is not there, or not as it was written."""
    return [number for number, file in enumerate(files) if not is_sealed(file)]


def _write_pairs(pairing: Pairing) -> dict[str, Any]:
    """Write the pairs that the caps leave; return their number, that of their seeds, and their histograms."""
    counts: dict[str, Any] = {"pairs": 0, "seeds": 0, "similarities": 0, "containments": 0}

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for rows in taken_pairs(pairing):
            counts["pairs"] += len(rows)
            counts["seeds"] += len(np.unique(rows["seed"]))
            counts["similarities"] += _histogram(rows["score"], SIMILARITY_EDGES)
            counts["containments"] += _histogram(rows["containment"], CONTAINMENT_EDGES)
            unique = pairing.documents.rows
            yield unique[rows["seed"]], unique[rows["partner"]], rows["score"]

    write_pairs(pairing.directory, parts())
    return counts


def _low(config: PairConfig, random: np.ndarray, console: Console) -> tuple[float, str]:
    """Return the lower end of the band, and whether it was "given" or "auto" found it."""
    if config.similarity_low != "auto":
        return config.similarity_low, "given"
    low = low_cut_off(random, config.random_pair_rate)
    console.say(f"similarity band from {low:.3f}, which {config.random_pair_rate:.2%} of random pairs reach")
    return low, "auto"


def _check_recall(recall: dict[str, Any], partitions: int, config: PairConfig) -> None:
    if not recall["recall"] >= config.target_recall:
        remedy = "raise pair.partition_overlap or pair.partition_documents, or " if partitions > 1 else ""
        raise UserError(
            "pair",
            f"{recall['recall']:.4f} of the pairs in the band were found, by {recall['pairs']} that an exact search finds from "
            f"{recall['queries']} documents, and pair.target_recall is {config.target_recall}",
            f"{remedy}lower pair.target_recall",
        )


def _no_pairs(counts: Counter[str], nearest: np.ndarray, low: float, config: PairConfig) -> UserError:
    groups, near = counts["same_group"], counts["near_duplicates"]
    dropped = f"{groups} within one original and {near} near-duplicates were dropped" if groups or near else ""
    reached = (
        f"the nearest neighbors that may be paired have {np.median(nearest):.3f} at the median and {nearest.max():.3f} at most"
        if len(nearest)
        else "no neighbor may be paired"
    )
    return UserError(
        "pair",
        f"no pair is left in the band, similarity {low:.3f} to {config.similarity_high:.3f}: "
        + "; ".join(filter(None, [dropped, reached])),
        "set pair.similarity_low to a lower number" + (", or raise pair.near_duplicate_containment" if near else ""),
    )


def _histograms(nearest: np.ndarray, random: np.ndarray, taken: dict[str, Any]) -> dict[str, Any]:
    """Histograms of similarities and of containment, for the manifest."""
    return {
        "histogram": {
            "edges": SIMILARITY_EDGES.tolist(),
            "nearest": _histogram(nearest, SIMILARITY_EDGES).tolist(),
            "random": _histogram(random, SIMILARITY_EDGES).tolist(),
            "pairs": taken["similarities"].tolist(),
        },
        "containment": {"edges": CONTAINMENT_EDGES.tolist(), "pairs": taken["containments"].tolist()},
    }


def _histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count values per bin; those outside are counted in the outermost bins."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
