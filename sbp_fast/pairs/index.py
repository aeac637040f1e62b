"""Nearest neighbours by inner product: an HNSW index, and the exact search that it is measured against."""

from __future__ import annotations

import hnswlib
import numpy as np
import torch

from sbp_fast.errors import UserError
from sbp_fast.progress import Task

INSERT_BLOCK, SEARCH_BLOCK = 1024, 4096


class NeighbourIndex:
    """A hierarchical navigable small world graph (Malkov and Yashunin, 2018) over unit vectors, from hnswlib.

    It is built by one thread: with more, hnswlib gives other neighbours at each run. Do not put copies of a vector in:
    among many of them the graph loses other vectors.

    Args:
        vectors: float32 [documents, dimension], unit norm.
        links: edges of a node in each layer but the lowest, which has twice as many.
        construction: candidates held while a node is inserted; more is slower and better.
        seed: draws the nodes' layers.
        task: advanced by one for each vector inserted.
    """

    def __init__(self, vectors: np.ndarray, *, links: int, construction: int, seed: int, task: Task | None = None) -> None:
        self.documents = len(vectors)
        self._vectors = vectors
        self._index = hnswlib.Index(space="ip", dim=vectors.shape[1])
        self._index.init_index(max_elements=self.documents, M=links, ef_construction=construction, random_seed=seed)
        for start in range(0, self.documents, INSERT_BLOCK):
            rows = np.arange(start, min(start + INSERT_BLOCK, self.documents))
            self._index.add_items(vectors[rows], rows, num_threads=1)
            if task is not None:
                task.advance(len(rows))

    def neighbours(self, k: int, *, search: int, threads: int) -> np.ndarray:
        """The k nearest other documents of each document, nearest first. int64 [documents, min(k, documents - 1)].

        Args:
            search: candidates held during a search; raised where it is too small for k.

        Raises:
            UserError: the graph is too sparse for a search to reach k documents.
        """
        k = min(k, self.documents - 1)
        found = np.empty((self.documents, k), dtype=np.int64)
        for start in range(0, self.documents, SEARCH_BLOCK):
            rows = np.arange(start, min(start + SEARCH_BLOCK, self.documents))
            ids = self._search(self._vectors[rows], k + 1, search, threads)
            # A document is mostly, but not always, its own nearest: it goes last, and the last is cut off.
            others_first = np.argsort(ids == rows[:, None], axis=1, kind="stable")
            found[rows] = np.take_along_axis(ids, others_first, axis=1)[:, :k]
        return found

    def _search(self, queries: np.ndarray, k: int, search: int, threads: int) -> np.ndarray:
        width = max(search, k)
        while True:
            self._index.set_ef(width)
            try:
                return self._index.knn_query(queries, k=k, num_threads=threads)[0].astype(np.int64)
            except RuntimeError as error:
                if "contiguous 2D array" not in str(error):  # hnswlib's words for: fewer than k were reached
                    raise
                if width >= self.documents:
                    remedy = "raise pair.hnsw_links or lower pair.neighbours"
                    raise UserError("nearest-neighbour index", f"a search reaches fewer than {k} documents", remedy) from None
                width *= 2


def exact_neighbours(queries: np.ndarray, vectors: np.ndarray, k: int, *, block: int = 65_536) -> tuple[np.ndarray, np.ndarray]:
    """The k vectors of greatest inner product with each query, by computing them all, `block` vectors at a time.

    Args:
        queries: float32 [queries, dimension].
        vectors: float32 [documents, dimension].

    Returns:
        int64 indices and float32 inner products, both [queries, min(k, documents)], greatest first.
    """
    queries_QD = torch.from_numpy(np.ascontiguousarray(queries))
    best_QK = torch.empty(len(queries), 0)
    rows_QK = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(vectors), block):
        scores_QB = queries_QD @ torch.from_numpy(np.ascontiguousarray(vectors[start : start + block])).T
        block_rows_QB = torch.arange(start, start + scores_QB.shape[1]).expand_as(scores_QB)
        scores, rows = torch.cat([best_QK, scores_QB], dim=1), torch.cat([rows_QK, block_rows_QB], dim=1)
        best_QK, order_QK = scores.topk(min(k, scores.shape[1]), dim=1)
        rows_QK = rows.gather(1, order_QK)
    return rows_QK.numpy(), best_QK.numpy()


def similarities(vectors: np.ndarray, first: np.ndarray, second: np.ndarray, *, block: int = 65_536) -> np.ndarray:
    """The inner product of each pair of rows; the same bits in both directions. float32 [pairs]."""
    parts = [
        np.einsum("pd,pd->p", vectors[first[start : start + block]], vectors[second[start : start + block]])
        for start in range(0, len(first), block)
    ]
    return np.concatenate([np.zeros(0, np.float32), *parts])
