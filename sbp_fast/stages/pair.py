"""The stage `pair`: documents that are related but not copies of each other, as ordered pairs (seed, partner)."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import PairConfig, RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import Unreachable, UserError
from sbp_fast.neighbors.merge import gather
from sbp_fast.neighbors.partitioned_join import INDEX, join_cells
from sbp_fast.neighbors.saved_index import Member, embedding_of, write_members
from sbp_fast.neighbors.vectors import Vectors, similarities
from sbp_fast.pairs.caps import cap_degrees, taken_pairs, write_turns
from sbp_fast.pairs.criteria import FAULTS, low_cut_off, random_pairs
from sbp_fast.pairs.document_statistics import Documents
from sbp_fast.pairs.examples import write_examples
from sbp_fast.pairs.pairset import write_pairs
from sbp_fast.pairs.score import facts_path, judge_range, measured_recall, nearest_eligible, sum_facts, write_sampled
from sbp_fast.pairs.tasks import WORK, Pairing
from sbp_fast.pipeline.executors.executor import Advance, Holders, Workers
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import Manifest, Work, run_stage

SIMILARITY_EDGES = np.linspace(-0.2, 1.0, 61).round(2)
CONTAINMENT_EDGES = np.linspace(0.0, 1.0, 21).round(2)


def pair(
    config: RunConfig,
    corpus: Path,
    vectors: Path,
    out: Path,
    *,
    console: Console,
    force: bool = False,
    workers: Workers = LOCAL,
) -> Manifest:
    """Find the related pairs among the unique documents of a prepared corpus.

    Copies and near-copies are first collapsed to one representative. Of those, a pair qualifies if either document is among
    the other's `pair.neighbours` nearest, their similarity lies in the band, they belong to different originals, and neither
    holds more than `pair.near_copy_containment` of the other's shingles; then the degree caps apply. Every pair is taken in
    both directions (Yang et al., 2025, section 2: all ordered pairs above a threshold).

    Writes `pairs.parquet`, `copies.parquet`, `examples.json` and, where an index is kept, `index/`. In the manifest,
    `candidates`, `pairs` and `dropped` count ordered pairs, `copies` documents.

    Raises:
        UserError: vectors of another corpus, too few documents, no pair in the band, or `pair.target_recall` not reached.
    """

    def body(work: Work) -> None:
        if not work.counted():
            _check_match(corpus, vectors)
            (work.directory / WORK).mkdir(exist_ok=True)
            try:
                known = Vectors(vectors, hashed=False)
                documents = Documents.load(PreparedCorpus(corpus), known, config.pair, work.directory / WORK)
                _pair(config, documents, work, workers)
                if (work.directory / INDEX).is_dir():
                    write_members(work.directory, [Member.of(known)], embedding_of(known))
            except Unreachable:
                raise
            except UserError:  # what was joined is of no use to the settings that mend it, and would stand in their way
                for folder in (WORK, INDEX):
                    shutil.rmtree(work.directory / folder, ignore_errors=True)
                raise
            work.keep_counts()
        shutil.rmtree(work.directory / WORK, ignore_errors=True)

    return run_stage(
        "pair",
        out,
        config={"pair": config.pair.settings(), "seed": config.seed},
        inputs={"corpus": corpus, "vectors": vectors},
        body=body,
        console=console,
        force=force,
    )


def _pair(config: RunConfig, documents: Documents, work: Work, workers: Workers) -> None:
    copies = documents.copies.counts()
    work.console.say(
        f"{len(documents)} documents, after " + ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in copies.items())
    )
    random = similarities(documents.vectors, *random_pairs(documents.groups, np.random.default_rng(config.seed)))
    low, origin = _low(config.pair, random, work.console)
    with workers.hold(partial(Pairing, config, documents, low, work.directory, work.console), config) as holders:
        pairing = Pairing(config, documents, low, work.directory, work.console, holders.place)
        join = join_cells(pairing, holders, work)
        facts = _judge(pairing, holders, work)
        nearest = nearest_eligible(pairing)
        if not facts["candidates"] - sum(facts[fault] for fault in FAULTS):
            raise _no_pairs(facts, nearest, low, config.pair)
        recall = measured_recall(pairing, facts)
        _check_recall(recall, join, config.pair)
        _run(write_turns, pairing.files("sizes"), holders, work)
    capped = cap_degrees(pairing)
    taken = _write_pairs(pairing)
    documents.copies.write(work.directory)
    write_examples(pairing)
    work.record(
        documents=len(documents) + sum(copies.values()),
        copies=copies,
        pairs=taken["pairs"],
        seeds=taken["seeds"],
        band={"low": low, "high": config.pair.similarity_high, "low_origin": origin},
        random_pair_rate=float(np.mean(random >= low)),
        join=join,
        candidates=2 * facts["candidates"],
        dropped={**{fault: 2 * facts[fault] for fault in FAULTS}, **capped},
        recall=recall,
        histogram={
            "edges": SIMILARITY_EDGES.tolist(),
            "nearest": _histogram(nearest, SIMILARITY_EDGES).tolist(),
            "random": _histogram(random, SIMILARITY_EDGES).tolist(),
            "pairs": taken["similarities"].tolist(),
        },
        containment={"edges": CONTAINMENT_EDGES.tolist(), "pairs": taken["containments"].tolist()},
    )
    work.console.say(
        f"{taken['pairs']} pairs, {taken['seeds']} of {len(documents)} documents have a partner, "
        f"{recall['recall']:.4f} of the pairs in the band found"
    )


def _judge(pairing: Pairing, holders: Holders[Pairing], work: Work) -> Counter[str]:
    """Gather and judge the candidates of all ranges; returns the sums of what was counted of each."""
    edges, judged = pairing.files("edges"), [facts_path(pairing, number) for number in range(len(pairing.ranges))]
    edges[0].parent.mkdir(exist_ok=True)
    if not all(path.is_file() for path in judged):
        _run(gather, edges, holders, work)
        write_sampled(pairing)
        with work.console.task("candidates judged", len(pairing.documents), "documents") as task:
            _run(judge_range, judged, holders, work, task.advance)
    for path in edges:  # as large as what was judged
        path.unlink(missing_ok=True)
    return sum_facts(pairing)


def _run(
    function: Callable[[Pairing, int, Advance], None],
    markers: Sequence[Path],
    holders: Holders[Pairing],
    work: Work,
    advance: Advance = lambda amount: None,
) -> None:
    """Do the task of every range whose marker is not there yet."""
    missing = [number for number, marker in enumerate(markers) if not marker.is_file()]
    for _ in holders.run(function, missing, advance):
        work.keep_clock()


def _write_pairs(pairing: Pairing) -> dict[str, Any]:
    """Write the pairs that the caps leave; returns how many, of how many seeds, and their histograms."""
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


def _check_match(corpus: Path, vectors: Path) -> None:
    if (
        Manifest.load(vectors, "embed", hashed=False).inputs["corpus"]
        != Manifest.load(corpus, "prepare", hashed=False).fingerprint
    ):
        raise UserError(vectors, f"not the vectors of {corpus}", "run embed on this corpus first")


def _low(config: PairConfig, random: np.ndarray, console: Console) -> tuple[float, str]:
    if config.similarity_low != "auto":
        return config.similarity_low, "given"
    low = low_cut_off(random, config.random_pair_rate)
    console.say(f"similarity band from {low:.3f}, which {config.random_pair_rate:.2%} of random pairs reach")
    return low, "auto"


def _check_recall(recall: dict[str, Any], join: dict[str, Any], config: PairConfig) -> None:
    if recall["recall"] < config.target_recall:
        cells = "raise pair.cell_overlap or pair.cell_documents, or " if join["cells"] > 1 else ""
        raise UserError(
            "pair",
            f"{recall['recall']:.4f} of the pairs in the band were found, by {recall['pairs']} that an exact search finds from "
            f"{recall['queries']} documents, and pair.target_recall is {config.target_recall}",
            f"{cells}lower pair.target_recall",
        )


def _no_pairs(facts: Counter[str], nearest: np.ndarray, low: float, config: PairConfig) -> UserError:
    groups, copies = facts["same_group"], facts["near_copies"]
    lost = f"{groups} within one original and {copies} near-copies were dropped" if groups or copies else ""
    reached = (
        f"the nearest neighbours that may be paired have {np.median(nearest):.3f} at the median and {nearest.max():.3f} at most"
        if len(nearest)
        else "no neighbour may be paired"
    )
    return UserError(
        "pair",
        f"no pair is left in the band, similarity {low:.3f} to {config.similarity_high:.3f}: "
        + "; ".join(filter(None, [lost, reached])),
        "set pair.similarity_low to a lower number" + (", or raise pair.near_copy_containment" if copies else ""),
    )


def _histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Counts per bin; what lies outside is counted in the outermost bins."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
