"""The self-join by buckets: a query meets the members of the buckets that it probes, one matrix product a bucket.

A self-join knows all its queries beforehand. So the many that probe one bucket share one product with its members, where
an index asked for one query after another reads memory at random (the same idea as faiss.contrib.big_batch_search). On CUDA
they share it in rounds, the nearest buckets of all queries first, and no product leaves the kernel that computes it.
"""

from __future__ import annotations

import numpy as np
import torch

from sbp_fast.neighbors.blocks import in_blocks
from sbp_fast.neighbors.exact import SPARE, collect, growing
from sbp_fast.neighbors.kmeans import nearest_centroids, train_centroids
from sbp_fast.neighbors.top_k import NOBODY, HeapBest, best_by_rounds, rank
from sbp_fast.pipeline.progress import Task

QUERIES = {"cpu": 8192, "cuda": 65_536}
SAMPLED = 32  # vectors a bucket that the centroids are trained on


class BucketJoin:
    """Each vector lies in the bucket of its nearest centroid; a query probes the buckets of its nearest `effort` centroids.

    Args:
        vectors: float32 [documents, dimension], unit norm.
        seed: draws the sample that the centroids are trained on.

    Attributes:
        efforts: numbers of buckets to probe, rising; the last is all of them, which is exact.
    """

    def __init__(self, vectors: np.ndarray, *, seed: int, threads: int, device: str = "cpu", first_effort: int = 4) -> None:
        self.vectors, self.threads = vectors, threads
        self.device = torch.device(device).type
        buckets = max(1, min(len(vectors) // 8, round(len(vectors) ** 0.5)))
        sample = np.random.default_rng(seed).permutation(len(vectors))[: SAMPLED * buckets]
        self.centroids = train_centroids(vectors[np.sort(sample)], buckets, seed=seed, threads=threads, device=device)
        bucket = nearest_centroids(vectors, self.centroids, 1, threads=threads, device=device)[:, 0]
        self.order = np.argsort(bucket, kind="stable")
        self.starts = np.searchsorted(bucket[self.order], np.arange(buckets + 1))
        self._place = np.argsort(self.order)
        self._members = torch.from_numpy(vectors[self.order]).to(device)
        self.efforts = tuple(growing(first_effort, buckets))

    def search(self, rows: np.ndarray, k: int, effort: int, task: Task | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k other members nearest to each of the members `rows`: ids int64 and products float32, [rows, k].

        Args:
            effort: buckets to probe.
        """
        by_bucket = np.argsort(self._place[rows], kind="stable")  # neighbours in this order probe the same buckets
        sorted_rows = rows[by_bucket]
        device = str(self._members.device)
        probes = nearest_centroids(self.vectors[sorted_rows], self.centroids, effort, threads=self.threads, device=device)

        def work(part: slice) -> tuple[np.ndarray, np.ndarray]:
            return self._search_block(sorted_rows[part], probes[part], k)

        ids, scores = collect(in_blocks(len(rows), QUERIES[self.device], work, self.threads), k, task)
        back = np.argsort(by_bucket)
        return ids[back], scores[back]

    def _search_block(self, own: np.ndarray, probes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        kept = min(k + SPARE, len(self.vectors))
        found = self._on_cpu(own, probes, kept) if self.device == "cpu" else self._on_device(own, probes, kept)
        return rank(self.vectors, self.vectors[own], own, found, k)

    def _on_cpu(self, own: np.ndarray, probes: np.ndarray, k: int) -> np.ndarray:
        found = HeapBest(own, k)
        queries_QD = self._members[self._place[own]]
        by_bucket = np.argsort(probes.reshape(-1), kind="stable")
        asked = torch.from_numpy(by_bucket // probes.shape[1])
        buckets, firsts = np.unique(probes.reshape(-1)[by_bucket], return_index=True)
        for bucket, first, last in zip(buckets, firsts, [*firsts[1:], len(by_bucket)], strict=True):
            members = slice(self.starts[bucket], self.starts[bucket + 1])
            queries_P = asked[first:last]
            found.add(queries_QD[queries_P] @ self._members[members].T, queries_P, torch.from_numpy(self.order[members]))
        return found.ids

    def _on_device(self, own: np.ndarray, probes: np.ndarray, k: int) -> np.ndarray:
        device = self._members.device
        starts, own_Q = (torch.from_numpy(x).to(device) for x in (self.starts, self._place[own]))
        rounds_RQ = torch.from_numpy(probes).to(device).T.contiguous()
        places = best_by_rounds(self._members, starts, own_Q, rounds_RQ, k)
        return np.where(places == NOBODY, NOBODY, self.order[places])
