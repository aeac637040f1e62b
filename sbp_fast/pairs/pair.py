"""The stage `pair`: documents that are related but not copies of each other, as ordered pairs (seed, partner)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import PairConfig, RunConfig
from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.errors import Unreachable, UserError
from sbp_fast.pairs.candidates import Candidates, measure_recall
from sbp_fast.pairs.documents import Documents
from sbp_fast.pairs.examples import write_examples
from sbp_fast.pairs.joined import CELLS, INDEX, join_cells
from sbp_fast.pairs.pairset import write_pairs
from sbp_fast.pairs.select import Verdict, cap_degrees, join_both_directions, low_cut_off, random_pairs
from sbp_fast.pairs.vectors import Vectors, similarities
from sbp_fast.progress import Console
from sbp_fast.stage import Manifest, Work, run_stage
from sbp_fast.workers.local import LOCAL
from sbp_fast.workers.workers import Workers

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
        _check_match(corpus, vectors)
        prepared = PreparedCorpus(corpus)
        documents = Documents.load(prepared, Vectors(vectors), config.pair)
        try:
            _pair(config, prepared, documents, work, workers)
        except Unreachable:
            raise
        except UserError:  # what was joined is of no use to the settings that mend it, and would stand in their way
            for folder in (CELLS, INDEX):
                shutil.rmtree(work.directory / folder, ignore_errors=True)
            raise

    return run_stage(
        "pair",
        out,
        config={"pair": config.pair.model_dump(mode="json"), "seed": config.seed},
        inputs={"corpus": corpus, "vectors": vectors},
        body=body,
        console=console,
        force=force,
    )


def _pair(config: RunConfig, prepared: PreparedCorpus, documents: Documents, work: Work, workers: Workers) -> None:
    settings = config.pair
    copies = documents.copies.counts()
    work.console.say(f"{len(documents)} documents, after " + ", ".join(f"{n} {kind}" for kind, n in copies.items()))
    random = similarities(documents.vectors, *random_pairs(documents.groups, np.random.default_rng(config.seed)))
    low, origin = _low(settings, random, work.console)

    def wanted(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return Candidates.weigh(documents, first, second, low).judge(low, settings).kept

    merged, join = join_cells(config, documents, wanted, work, workers)
    first, second, similarity = join_both_directions(merged.ids, merged.similarities)
    candidates = Candidates.weigh(documents, first, second, low, similarity)
    verdict = candidates.judge(low, settings)
    nearest = candidates.nearest_eligible(settings, len(documents))
    if not verdict.kept.any():
        raise _no_pairs(verdict, nearest, low, settings)
    recall = measure_recall(documents, candidates, low, settings, config.seed)
    _check_recall(recall, join, settings)

    kept = np.flatnonzero(verdict.kept)
    seeds, partners, scores, capped = cap_degrees(
        candidates.first[kept],
        candidates.second[kept],
        candidates.scores[kept],
        settings.partners_per_seed,
        settings.seeds_per_partner,
    )
    write_pairs(work.directory, documents.rows[seeds], documents.rows[partners], scores)
    documents.copies.write(work.directory)
    write_examples(work.directory, prepared, documents, candidates, verdict)
    copied = candidates.containment[candidates.places(seeds, partners, len(documents))]
    work.record(
        documents=len(documents) + sum(copies.values()),
        copies=copies,
        pairs=len(seeds),
        seeds=len(np.unique(seeds)),
        band={"low": low, "high": settings.similarity_high, "low_origin": origin},
        random_pair_rate=float(np.mean(random >= low)),
        join=join,
        candidates=2 * len(candidates.first),
        dropped={**{fault: 2 * int(found.sum()) for fault, found in verdict.dropped.items()}, **capped},
        recall=recall,
        histogram={
            "edges": SIMILARITY_EDGES.tolist(),
            "nearest": _histogram(nearest, SIMILARITY_EDGES),
            "random": _histogram(random, SIMILARITY_EDGES),
            "pairs": _histogram(scores, SIMILARITY_EDGES),
        },
        containment={"edges": CONTAINMENT_EDGES.tolist(), "pairs": _histogram(copied, CONTAINMENT_EDGES)},
    )
    shutil.rmtree(work.directory / CELLS)
    work.console.say(
        f"{len(seeds)} pairs, {len(np.unique(seeds))} of {len(documents)} documents have a partner, "
        f"{recall['recall']:.4f} of the pairs in the band found"
    )


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
            f"{recall['recall']:.4f} of the {recall['pairs']} pairs in the band that an exact search finds were found, and "
            f"pair.target_recall is {config.target_recall}",
            f"{cells}lower pair.target_recall",
        )


def _no_pairs(verdict: Verdict, nearest: np.ndarray, low: float, config: PairConfig) -> UserError:
    groups, copies = (int(verdict.dropped[fault].sum()) for fault in ("same_group", "near_copies"))
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


def _histogram(values: np.ndarray, edges: np.ndarray) -> list[int]:
    """Counts per bin; what lies outside is counted in the outermost bins."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()
