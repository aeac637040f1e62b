"""The stage `pair`: documents that are related but not copies of each other, as ordered pairs (seed, partner)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbp_fast.config import PairConfig, RunConfig, resolve_threads
from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.pairs.embed import load_vectors
from sbp_fast.pairs.index import NeighbourIndex, exact_neighbours, similarities
from sbp_fast.pairs.pairset import write_pairs
from sbp_fast.pairs.select import (
    Verdict,
    cap_degrees,
    first_of_equals,
    join_both_directions,
    judge,
    low_cut_off,
    random_pairs,
)
from sbp_fast.pairs.shingles import ShingleTable
from sbp_fast.progress import Console
from sbp_fast.stage import Manifest, Work, run_stage

MINIMUM_DOCUMENTS = 16
SIMILARITY_EDGES = np.linspace(-0.2, 1.0, 61).round(2)
CONTAINMENT_EDGES = np.linspace(0.0, 1.0, 21).round(2)


def pair(config: RunConfig, corpus: Path, vectors: Path, out: Path, *, console: Console, force: bool = False) -> Manifest:
    """Find the related pairs among the unique documents of a prepared corpus.

    A pair qualifies if either document is among the other's `pair.neighbours` nearest, their similarity lies in the band,
    they belong to different originals, and neither holds more than `pair.near_copy_containment` of the other's shingles;
    then the degree caps apply. Every pair is taken in both directions (Yang et al., 2025, section 2: all ordered pairs
    above a threshold). Of documents with the same tokens only the first takes part. Writes `pairs.parquet`.

    In the manifest, `candidates`, `pairs` and `dropped` count ordered pairs, `dropped.exact_copies` documents.

    Raises:
        UserError: vectors of another corpus, too few documents, or no pair in the band.
    """

    def body(work: Work) -> None:
        torch.set_num_threads(resolve_threads(config))
        _check_match(corpus, vectors)
        documents = Documents.load(PreparedCorpus(corpus), load_vectors(vectors), config.pair)
        _pair(config, documents, work)

    return run_stage(
        "pair",
        out,
        config={"pair": config.pair.model_dump(mode="json"), "seed": config.seed},
        inputs={"corpus": corpus, "vectors": vectors},
        body=body,
        console=console,
        force=force,
    )


@dataclass(frozen=True)
class Documents:
    """What pairing knows of the documents that differ from each other.

    Attributes:
        rows: int64 [documents], their indices in the unique corpus.
        vectors: float32 [documents, dimension].
        groups: int64 [documents], equal for parts of one original that must not be paired.
        shingles: of each document.
        copies: how many documents were left out because their tokens equal another's.
    """

    rows: np.ndarray
    vectors: np.ndarray
    groups: np.ndarray
    shingles: ShingleTable
    copies: int

    @staticmethod
    def load(prepared: PreparedCorpus, vectors: np.ndarray, config: PairConfig) -> Documents:
        corpus = prepared.unique
        rows = first_of_equals(corpus[row] for row in range(len(corpus)))
        if len(rows) < MINIMUM_DOCUMENTS:
            raise UserError(
                prepared.directory,
                f"{len(rows)} unique documents are too few to pair",
                f"give a corpus with at least {MINIMUM_DOCUMENTS}, or raise corpus.unique_share",
            )
        groups = np.arange(len(rows))
        if config.exclude_same_group:
            names = [prepared.group(str(id)) for id in corpus.ids[rows]]
            groups = np.unique(names, return_inverse=True)[1]
            if groups.max() == 0:
                raise UserError(
                    prepared.directory,
                    f'all documents are parts of one original, "{names[0]}", by their ids',
                    "set pair.exclude_same_group to false, or corpus.group_separator to what divides your ids",
                )
        shingles = ShingleTable.build([corpus[row][1:-1] for row in rows], config.shingle_tokens)
        return Documents(rows, vectors[rows], groups, shingles, copies=len(corpus) - len(rows))

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Candidates:
    """Pairs of documents, each once, with what decides over them; arrays of [candidates].

    Attributes:
        scores: float32, cosine similarity.
        containment: float64, the greater of the shares of one's shingles that occur in the other.
        same_group: bool.
    """

    first: np.ndarray
    second: np.ndarray
    scores: np.ndarray
    containment: np.ndarray
    same_group: np.ndarray

    @staticmethod
    def weigh(documents: Documents, first: np.ndarray, second: np.ndarray) -> Candidates:
        return Candidates(
            first,
            second,
            similarities(documents.vectors, first, second),
            np.maximum(*documents.shingles.containment(first, second)),
            documents.groups[first] == documents.groups[second],
        )

    def judge(self, low: float, config: PairConfig) -> Verdict:
        return judge(
            {
                "below_band": self.scores < low,
                "above_band": self.scores > config.similarity_high,
                "same_group": self.same_group,
                "near_copies": self.containment >= config.near_copy_containment,
            }
        )


def _pair(config: RunConfig, documents: Documents, work: Work) -> None:
    settings, generator = config.pair, np.random.default_rng(config.seed)
    random = similarities(documents.vectors, *random_pairs(documents.groups, generator))
    low, origin = _low(settings, random, work.console)
    neighbours = _neighbours(config, documents, work.console)
    candidates = Candidates.weigh(documents, *join_both_directions(neighbours))
    verdict = candidates.judge(low, settings)
    nearest = _nearest_eligible(candidates, settings, len(documents))
    if not verdict.kept.any():
        raise _no_pairs(verdict, nearest, low, settings)

    kept = np.flatnonzero(verdict.kept)
    seeds, partners, scores, capped = cap_degrees(
        candidates.first[kept],
        candidates.second[kept],
        candidates.scores[kept],
        settings.partners_per_seed,
        settings.seeds_per_partner,
    )
    write_pairs(work.directory, documents.rows[seeds], documents.rows[partners], scores)
    recall = _recall(documents, candidates, low, settings, generator)
    copied = np.maximum(*documents.shingles.containment(seeds, partners))
    work.record(
        documents=len(documents) + documents.copies,
        pairs=len(seeds),
        seeds=len(np.unique(seeds)),
        band={"low": low, "high": settings.similarity_high, "low_origin": origin},
        random_pair_rate=float(np.mean(random >= low)),
        candidates=2 * len(candidates.first),
        dropped={
            "exact_copies": documents.copies,
            **{fault: 2 * int(found.sum()) for fault, found in verdict.dropped.items()},
            **capped,
        },
        recall=recall,
        histogram={
            "edges": SIMILARITY_EDGES.tolist(),
            "nearest": _histogram(nearest, SIMILARITY_EDGES),
            "random": _histogram(random, SIMILARITY_EDGES),
        },
        containment={"edges": CONTAINMENT_EDGES.tolist(), "pairs": _histogram(copied, CONTAINMENT_EDGES)},
    )
    work.console.say(
        f"{len(seeds)} pairs, {len(np.unique(seeds))} of {len(documents)} documents have a partner, "
        f"recall {recall['recall']:.4f} against the exact search"
    )


def _check_match(corpus: Path, vectors: Path) -> None:
    if Manifest.load(vectors, "embed").inputs["corpus"] != Manifest.load(corpus, "prepare").fingerprint:
        raise UserError(vectors, f"not the vectors of {corpus}", "run embed on this corpus first")


def _low(config: PairConfig, random: np.ndarray, console: Console) -> tuple[float, str]:
    if config.similarity_low != "auto":
        return config.similarity_low, "given"
    low = low_cut_off(random, config.random_pair_rate)
    console.say(f"similarity band from {low:.3f}, which {config.random_pair_rate:.2%} of random pairs reach")
    return low, "auto"


def _neighbours(config: RunConfig, documents: Documents, console: Console) -> np.ndarray:
    settings = config.pair
    with console.task("documents indexed", len(documents), "documents") as task:
        index = NeighbourIndex(
            documents.vectors,
            links=settings.hnsw_links,
            construction=settings.hnsw_construction,
            seed=config.seed,
            task=task,
        )
    return index.neighbours(settings.neighbours, search=settings.hnsw_search, threads=resolve_threads(config))


def _nearest_eligible(candidates: Candidates, config: PairConfig, documents: int) -> np.ndarray:
    """The similarity of each document's nearest neighbour that is neither of its group nor a near-copy, where there is one."""
    eligible = ~candidates.same_group & (candidates.containment < config.near_copy_containment)
    nearest = np.full(documents, -np.inf, dtype=np.float32)
    for end in (candidates.first, candidates.second):
        np.maximum.at(nearest, end[eligible], candidates.scores[eligible])
    return nearest[np.isfinite(nearest)]


def _recall(
    documents: Documents, candidates: Candidates, low: float, config: PairConfig, generator: np.random.Generator
) -> dict[str, Any]:
    """Of the pairs that an exact search of sampled documents finds and that qualify, how many are among the candidates."""
    queries = generator.choice(len(documents), size=min(config.recall_queries, len(documents)), replace=False)
    others = exact_neighbours(documents.vectors[queries], documents.vectors, config.neighbours + 1)[0]
    rows = np.repeat(queries, others.shape[1])
    exact = Candidates.weigh(documents, rows, others.reshape(-1))
    wanted = exact.judge(low, config).kept  # never a document with itself: that is one group
    first, second = exact.first[wanted], exact.second[wanted]
    found = np.isin(
        np.minimum(first, second) * len(documents) + np.maximum(first, second),
        candidates.first * len(documents) + candidates.second,
    )
    share = float(found.mean()) if len(found) else 1.0
    return {"queries": len(queries), "pairs": len(found), "found": int(found.sum()), "recall": share}


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
