"""kNN self-join: the nearest neighbors of all vectors among themselves, by any backend, at a measured recall."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sbp_fast.config import PairConfig
from sbp_fast.errors import UserError
from sbp_fast.neighbors.backends import BACKENDS, KnnSearcher
from sbp_fast.neighbors.exact import ExactSearcher
from sbp_fast.neighbors.hnsw import HnswIndex
from sbp_fast.pipeline.progress import Console

PairFilter = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Which pairs of vectors, int64 [pairs] each, count for recall: bool [pairs]."""
MARGIN = 2.0  # standard errors by which the recall of a sample must be above the target


@dataclass(frozen=True)
class SelfJoinResult:
    """The neighbors that a self-join found, and the search budget that it took.

    Attributes:
        ids: int64 [documents, k], indices of vectors, nearest first; -1 where there are fewer.
        similarities: float32 [documents, k], inner products, the same bits in either direction; -inf where there are fewer.
        search_budget: see `KnnSearcher.search_budgets`; 0 where all products were computed.
        recall: of the counted pairs that an exact search finds from sampled documents, the share found from them.
        index: that the backend built, if it builds one.
    """

    ids: np.ndarray
    similarities: np.ndarray
    search_budget: int
    recall: float
    index: HnswIndex | None = None


def self_join(
    vectors: np.ndarray,
    ids: np.ndarray,
    config: PairConfig,
    *,
    backend: str,
    counted: PairFilter,
    seed: int,
    threads: int,
    device: str,
    console: Console,
) -> SelfJoinResult:
    """Find the `config.neighbors` nearest others of every vector at the least search budget that reaches the target recall.

    All pairs of sampled documents are found exactly. The budget then rises until the share of the counted ones that a search
    finds, from either document, is surely at `config.target_recall` (`RecallSample.recall`).

    Args:
        vectors: float32 [documents, dimension], unit norm.
        ids: int64 [documents], ascending: the ids of the documents in a saved index.
        config: of the search.
        backend: a name in `BACKENDS`.
        counted: which pairs of `vectors` count for recall.
        seed: of the sample and of whatever else is random.
        threads: of the CPU.
        device: of torch.
        console: shows the progress.

    Returns:
        The same result from any number of threads and at every rerun.

    Raises:
        UserError: no search budget reaches the target; the backend is unknown.
        ValueError: two vectors are equal and the backend is hnsw.
    """
    knn_backend, sample = BACKENDS[backend], None
    if not knn_backend.exact:  # before the backend is opened: a device need not hold the vectors twice
        sample = _exact_sample(ExactSearcher(vectors, threads=threads, device=device), config, counted, seed)
    searcher = knn_backend.open(vectors, ids, config, seed=seed, threads=threads, device=device, console=console)
    budget, recall = (0, 1.0) if sample is None else _tune(searcher, sample, config, backend)
    with console.task(f"neighbors searched ({backend})", len(vectors), "documents") as task:
        neighbors, similarities = searcher.search(np.arange(len(vectors)), config.neighbors, budget, task)
    return SelfJoinResult(neighbors, similarities, budget, recall, searcher.index)


def sample_queries(documents: int, config: PairConfig, seed: int) -> np.ndarray:
    """Return the documents whose neighbors are also searched exactly, int64 ascending."""
    return np.sort(np.random.default_rng(seed).permutation(documents)[: config.recall_queries])


@dataclass(frozen=True)
class RecallSample:
    """Pairs that an exact search finds from sampled documents.

    Attributes:
        first: int64 [pairs], the sampled document of each.
        second: int64 [pairs], its neighbor.
        similarities: float32 [pairs].
    """

    first: np.ndarray
    second: np.ndarray
    similarities: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """The documents to search from: both documents of each pair, ascending."""
        return np.union1d(self.first, self.second)

    def recall(self, neighbors: np.ndarray, similarities: np.ndarray) -> tuple[float, float]:
        """Estimate the share of all pairs that a self-join of all documents finds from either document.

        Args:
            neighbors: int64 [rows, k], of the documents `rows`.
            similarities: float32 [rows, k], of these, greatest first.

        Returns:
            The share, and a lower bound of it by MARGIN standard errors. Pairs of one sampled document are found or missed
            together, so the error is that of a ratio of sums over documents (Cochran 1977, section 6.3). That error is itself
            uncertain where few pairs are missed, so the bound is Wilson's (1927) for as many independent pairs as have it.
        """
        if not len(self.first):
            return 1.0, 1.0
        first, second = np.searchsorted(self.rows, self.first), np.searchsorted(self.rows, self.second)
        hit = ((neighbors[first] == self.second[:, None]) | (neighbors[second] == self.first[:, None])).any(axis=1)
        weight = sampling_weight(self.similarities, similarities[second, -1])
        share = float(weight[hit].sum() / weight.sum())
        if hit.all():
            return 1.0, 1.0
        excess = np.bincount(self.first, weight * (hit - share))  # of each document, found beyond the mean share
        error = float(np.sqrt(np.square(excess).sum()) / weight.sum())
        return share, wilson_bound(share, error)


def wilson_bound(share: float, error: float) -> float:
    """Return the least true share from which an estimate with this standard error is MARGIN standard errors away."""
    spread = MARGIN**2 * error**2 / max(share * (1 - share), 1e-12)  # MARGIN^2 / independent pairs
    middle, half = share + spread / 2, MARGIN * math.sqrt(error**2 + spread**2 / (4 * MARGIN**2))
    return (middle - half) / (1 + spread)


def sampling_weight(similarities: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Return the weights of pairs found from one sampled document; a pair that both documents would find is twice as likely.

    Args:
        similarities: of the pairs.
        reach: of the documents that were not sampled, the similarity of the last of their k neighbors.
    """
    return np.where(similarities >= reach, 0.5, 1.0)


def _exact_sample(exact: ExactSearcher, config: PairConfig, counted: PairFilter, seed: int) -> RecallSample:
    queries = sample_queries(len(exact.vectors), config, seed)
    ids, similarities = exact.search(queries, config.neighbors)
    present = ids >= 0
    first, second = queries[np.nonzero(present)[0]], ids[present]
    counts = counted(first, second)
    return RecallSample(first[counts], second[counts], similarities[present][counts])


def _tune(searcher: KnnSearcher, sample: RecallSample, config: PairConfig, backend: str) -> tuple[int, float]:
    """Return the least search budget that surely reaches the target, and its recall."""
    budget, recall = 0, 1.0
    for budget in searcher.search_budgets or (0,):
        recall, lower_bound = sample.recall(*searcher.search(sample.rows, config.neighbors, budget))
        if lower_bound >= config.target_recall:
            return budget, recall
    remedies = [BACKENDS[backend].remedy, "take another pair.backend", "or lower pair.target_recall"]
    raise UserError(
        f"pair.backend = {backend}",
        f"finds {recall:.4f} of the pairs in the band at its greatest search budget, {budget}, and "
        f"pair.target_recall is {config.target_recall}",
        ", ".join(filter(None, remedies)),
    )
