"""kNN self-join by an inverted file: a query meets the members of the buckets that it probes, one matrix product a bucket.

A self-join knows all its queries in advance. So all queries that probe a bucket share one product with its members, where
an index that answers one query after another reads memory at random (the same idea as faiss.contrib.big_batch_search). On
CUDA they share it in rounds, the nearest buckets of all queries first, and no product leaves the kernel that computes it.
"""

from __future__ import annotations

import numpy as np
import torch

from sbp_fast.neighbors.blocks import map_blocks
from sbp_fast.neighbors.exact import SPARE, concatenate_blocks, growing_budgets
from sbp_fast.neighbors.kmeans import nearest_centroids, train_centroids
from sbp_fast.neighbors.searcher import KnnSearcher
from sbp_fast.neighbors.top_k import NO_NEIGHBOR, TopKHeaps, rerank, top_k_by_rounds
from sbp_fast.pipeline.progress import Task

QUERY_BLOCK = {"cpu": 8192, "cuda": 65_536}
TRAINING_VECTORS = 32  # a bucket, on which the centroids are trained


class IvfSearcher(KnnSearcher):
    """Search in the buckets of the centroids nearest to a query; each vector is in the bucket of its nearest centroid.

    Args:
        vectors: float32 [documents, dimension], unit norm.
        seed: of the sample on which the centroids are trained.
        threads: of the CPU.
        device: of torch.
        nprobe: the least search budget.

    Attributes:
        search_budgets: numbers of buckets to probe, rising; the last is all of them, which is exact.
    """

    def __init__(self, vectors: np.ndarray, *, seed: int, threads: int, device: str = "cpu", nprobe: int = 4) -> None:
        self.vectors, self.threads = vectors, threads
        self.device = torch.device(device).type
        buckets = max(1, min(len(vectors) // 8, round(len(vectors) ** 0.5)))
        sample = np.random.default_rng(seed).permutation(len(vectors))[: TRAINING_VECTORS * buckets]
        self.centroids = train_centroids(vectors[np.sort(sample)], buckets, seed=seed, threads=threads, device=device)
        bucket = nearest_centroids(vectors, self.centroids, 1, threads=threads, device=device)[:, 0]
        self.order = np.argsort(bucket, kind="stable")
        self.starts = np.searchsorted(bucket[self.order], np.arange(buckets + 1))
        self._position = np.argsort(self.order)
        self._members = torch.from_numpy(vectors[self.order]).to(device)
        self.search_budgets = growing_budgets(nprobe, buckets)

    def search(
        self, rows: np.ndarray, k: int, search_budget: int = 0, task: Task | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest other vectors of each of the vectors `rows`; see `KnnSearcher.search`.

        Args:
            rows: int64 [rows], indices of vectors.
            k: neighbors of each.
            search_budget: buckets to probe.
            task: advanced by the number of rows searched.
        """
        by_bucket = np.argsort(self._position[rows], kind="stable")  # adjacent queries then probe the same buckets
        sorted_rows = rows[by_bucket]

        def search_block(block: slice) -> tuple[np.ndarray, np.ndarray]:
            return self._search_block(sorted_rows[block], search_budget, k)

        blocks = map_blocks(len(rows), QUERY_BLOCK[self.device], search_block, self.threads)
        ids, scores = concatenate_blocks(blocks, k, task)
        inverse = np.argsort(by_bucket)
        return ids[inverse], scores[inverse]

    def _search_block(self, own: np.ndarray, search_budget: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        wide = min(k + SPARE, len(self.vectors))
        # here and not for all rows at once, whose probes at a large budget take more memory than the vectors
        device = str(self._members.device)
        probes = nearest_centroids(self.vectors[own], self.centroids, search_budget, threads=1, device=device)
        ids = self._on_cpu(own, probes, wide) if self.device == "cpu" else self._on_device(own, probes, wide)
        return rerank(self.vectors, self.vectors[own], own, ids, k)

    def _on_cpu(self, own: np.ndarray, probes: np.ndarray, k: int) -> np.ndarray:
        heaps = TopKHeaps(own, k)
        queries_QD = self._members[self._position[own]]
        by_bucket = np.argsort(probes.reshape(-1), kind="stable")
        query_rows = torch.from_numpy(by_bucket // probes.shape[1])
        buckets, firsts = np.unique(probes.reshape(-1)[by_bucket], return_index=True)
        for bucket, first, last in zip(buckets, firsts, [*firsts[1:], len(by_bucket)], strict=True):
            members = slice(self.starts[bucket], self.starts[bucket + 1])
            queries_P = query_rows[first:last]
            heaps.add(queries_QD[queries_P] @ self._members[members].T, queries_P, torch.from_numpy(self.order[members]))
        return heaps.ids

    def _on_device(self, own: np.ndarray, probes: np.ndarray, k: int) -> np.ndarray:
        device = self._members.device
        starts, own_Q = (torch.from_numpy(array).to(device) for array in (self.starts, self._position[own]))
        rounds_RQ = torch.from_numpy(probes).to(device).T.contiguous()
        positions = top_k_by_rounds(self._members, starts, own_Q, rounds_RQ, k)
        return np.where(positions == NO_NEIGHBOR, NO_NEIGHBOR, self.order[positions])
