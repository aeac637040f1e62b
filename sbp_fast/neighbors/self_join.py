"""The one way to ask for neighbours of all documents at once, whatever finds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from sbp_fast.config import PairConfig
from sbp_fast.errors import UserError
from sbp_fast.neighbors.exact import ExactJoin
from sbp_fast.neighbors.hnsw import HnswIndex, HnswJoin
from sbp_fast.neighbors.ivf import BucketJoin
from sbp_fast.pipeline.progress import Console, Task

Backend = Literal["exact", "bucket", "hnswlib"]
Wanted = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of pairs of members, int64 [pairs] each, which count for recall: bool [pairs]."""
EXACT_UP_TO = 6000  # documents; with more, buckets take less time at a pair recall of 0.99 (docs/log.md)
MARGIN = 2.0  # standard errors, by which the recall of a sample must be beyond the target
REMEDIES = {"bucket": "raise pair.bucket_probes", "hnswlib": "raise pair.hnsw_links or pair.hnsw_construction"}


class Join(Protocol):
    """Members among whom neighbours are searched.

    Attributes:
        efforts: settings of `search`, in the order of rising cost and recall; none where the search is exact.
    """

    @property
    def efforts(self) -> Sequence[int]: ...

    def search(self, rows: np.ndarray, k: int, effort: int, task: Task | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k other members nearest to each of the members `rows`: ids int64 and products float32, [rows, k], greatest
        first; -1 and -inf where there are fewer."""


@dataclass(frozen=True)
class Neighbours:
    """What a self-join found, and what it took.

    Attributes:
        ids: int64 [documents, k], places among the vectors, nearest first; -1 where there are fewer.
        similarities: float32 [documents, k], inner products, the same bits in either direction; -inf where there are fewer.
        effort: buckets probed, or width of the search; 0 where all products were computed.
        recall: of wanted pairs that the exact search finds from sampled documents, the share found from them.
        index: if the backend was hnswlib.
    """

    ids: np.ndarray
    similarities: np.ndarray
    effort: int
    recall: float
    index: HnswIndex | None = None


def choose_backend(config: PairConfig, documents: int) -> Backend:
    """What "auto" stands for with so many documents to join at once."""
    if config.backend != "auto":
        return config.backend
    return "exact" if documents <= EXACT_UP_TO else "bucket"


def self_join(
    vectors: np.ndarray,
    ids: np.ndarray,
    config: PairConfig,
    *,
    backend: Backend,
    wanted: Wanted,
    seed: int,
    threads: int,
    device: str,
    console: Console,
) -> Neighbours:
    """The `config.neighbours` nearest others of every vector, found at the least effort that reaches `config.target_recall`.

    Effort is chosen by itself: from sampled documents all pairs are found exactly, and effort rises until the share of the
    wanted ones that a search finds, from either side, is surely at the target (`Sample.recall`).

    Args:
        vectors: float32 [documents, dimension], unit norm.
        ids: int64 [documents], ascending: what a kept index calls them.
        wanted: which pairs of places among `vectors` count for recall.
        seed: draws the sample and whatever else is random.

    Returns:
        The same from any number of threads and at every rerun.

    Raises:
        UserError: no effort reaches the target.
        ValueError: two vectors are equal and the backend is hnswlib.
    """
    sample = None
    if backend != "exact":  # before the join is opened: a device need not hold the vectors twice
        sample = _exact_sample(ExactJoin(vectors, threads=threads, device=device), config, wanted, seed)
    join = _open(vectors, ids, config, backend, seed, threads, device, console)
    effort, recall = (0, 1.0) if sample is None else _tune(join, sample, config, backend)
    with console.task(f"documents joined ({backend})", len(vectors), "documents") as task:
        found, similarities = join.search(np.arange(len(vectors)), config.neighbours, effort, task)
    return Neighbours(found, similarities, effort, recall, join.index if isinstance(join, HnswJoin) else None)


def sampled(documents: int, config: PairConfig, seed: int) -> np.ndarray:
    """The documents whose neighbours are also searched exactly, int64 ascending."""
    return np.sort(np.random.default_rng(seed).permutation(documents)[: config.recall_queries])


@dataclass(frozen=True)
class Sample:
    """Pairs that an exact search finds from sampled documents.

    Attributes:
        first: int64 [pairs], the sampled document of each.
        second: int64 [pairs], its neighbour.
        similarities: float32 [pairs].
    """

    first: np.ndarray
    second: np.ndarray
    similarities: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """The documents to search from: either end of each pair, ascending."""
        return np.union1d(self.first, self.second)

    def recall(self, found: np.ndarray, similarities: np.ndarray) -> tuple[float, float]:
        """The share of all pairs that were found from either end, as a join of all documents would.

        Args:
            found: int64 [rows, k], the neighbours of `rows`.
            similarities: float32 [rows, k], of these, greatest first.

        Returns:
            The share, and what it is at least, by MARGIN standard errors. Pairs of one sampled document are found or missed
            together, so the error is that of a ratio of sums over documents (Cochran 1977, section 6.3), and as it is itself
            uncertain where few are missed, the bound is Wilson's (1927) for as many independent pairs as have that error.
        """
        if not len(self.first):
            return 1.0, 1.0
        first, second = np.searchsorted(self.rows, self.first), np.searchsorted(self.rows, self.second)
        hit = ((found[first] == self.second[:, None]) | (found[second] == self.first[:, None])).any(axis=1)
        weight = chance_weight(self.similarities, similarities[second, -1])
        share = float(weight[hit].sum() / weight.sum())
        if hit.all():
            return 1.0, 1.0
        beyond = np.bincount(self.first, weight * (hit - share))  # of each document, found beyond its share
        error = float(np.sqrt(np.square(beyond).sum()) / weight.sum())
        return share, wilson_bound(share, error)


def wilson_bound(share: float, error: float) -> float:
    """The least share from which one with this standard error is MARGIN standard errors away."""
    spread = MARGIN**2 * error**2 / max(share * (1 - share), 1e-12)  # MARGIN^2 / independent pairs
    middle, half = share + spread / 2, MARGIN * math.sqrt(error**2 + spread**2 / (4 * MARGIN**2))
    return (middle - half) / (1 + spread)


def chance_weight(similarities: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """What pairs drawn from one of their ends stand for: those that are drawn from the other as well come twice as often.

    Args:
        similarities: of the pairs.
        reach: of the ends that were not drawn, the similarity of the last of its k neighbours.
    """
    return np.where(similarities >= reach, 0.5, 1.0)


def _open(
    vectors: np.ndarray,
    ids: np.ndarray,
    config: PairConfig,
    backend: Backend,
    seed: int,
    threads: int,
    device: str,
    console: Console,
) -> Join:
    if backend == "exact":
        return ExactJoin(vectors, threads=threads, device=device)
    if backend == "bucket":
        return BucketJoin(vectors, seed=seed, threads=threads, device=device, first_effort=config.bucket_probes)
    with console.task("documents indexed", len(vectors), "documents") as task:
        return HnswJoin(
            vectors,
            ids,
            links=config.hnsw_links,
            construction=config.hnsw_construction,
            seed=seed,
            threads=threads,
            first_effort=config.hnsw_search,
            task=task,
        )


def _exact_sample(exact: ExactJoin, config: PairConfig, wanted: Wanted, seed: int) -> Sample:
    queries = sampled(len(exact.vectors), config, seed)
    ids, similarities = exact.search(queries, config.neighbours)
    there = ids >= 0
    first, second = queries[np.nonzero(there)[0]], ids[there]
    counts = wanted(first, second)
    return Sample(first[counts], second[counts], similarities[there][counts])


def _tune(join: Join, sample: Sample, config: PairConfig, backend: Backend) -> tuple[int, float]:
    """The least effort that surely reaches the target, and what it reaches."""
    recall = 1.0
    for effort in join.efforts:
        recall, at_least = sample.recall(*join.search(sample.rows, config.neighbours, effort))
        if at_least >= config.target_recall:
            return effort, recall
    raise UserError(
        f"pair.backend = {backend}",
        f"finds {recall:.4f} of the pairs in the band at its greatest effort, {join.efforts[-1]}, and "
        f"pair.target_recall is {config.target_recall}",
        f"{REMEDIES[backend]}, take another pair.backend, or lower pair.target_recall",
    )
