"""kNN search by all inner products: the reference for the other backends, and the fastest for few vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from sbp_fast.neighbors.blocks import map_blocks
from sbp_fast.neighbors.searcher import KnnSearcher
from sbp_fast.neighbors.top_k import NO_NEIGHBOR, TopKHeaps, rerank, take_top_k, top_k_by_rounds
from sbp_fast.pipeline.progress import Task

QUERY_BLOCK, MEMBER_BLOCK = {"cpu": 512, "cuda": 65_536}, 4096
SPARE = 8  # neighbors found beyond k, so that the rounding of a matrix product does not decide which are among the k


class ExactSearcher(KnnSearcher):
    """Every query against every vector, a tile of products at a time.

    Args:
        vectors: float32 [documents, dimension], unit norm.
        threads: of the CPU.
        device: of torch.
    """

    def __init__(self, vectors: np.ndarray, *, threads: int, device: str = "cpu") -> None:
        self.vectors, self.threads = vectors, threads
        self.device = torch.device(device).type
        self._members = torch.from_numpy(vectors).to(device)

    def search(
        self, rows: np.ndarray, k: int, search_budget: int = 0, task: Task | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest other vectors of each of the vectors `rows`; see `KnnSearcher.search`."""

        def search_block(block: slice) -> tuple[np.ndarray, np.ndarray]:
            own, wide = rows[block], min(k + SPARE, len(self.vectors))
            ids = self._on_cpu(own, wide) if self.device == "cpu" else self._on_device(own, wide)
            return rerank(self.vectors, self.vectors[own], own, ids, k)

        return concatenate_blocks(map_blocks(len(rows), QUERY_BLOCK[self.device], search_block, self.threads), k, task)

    def _on_cpu(self, own: np.ndarray, k: int) -> np.ndarray:
        heaps = TopKHeaps(own, k)
        queries_QD, query_rows_Q = self._members[own], torch.arange(len(own))
        for start in range(0, len(self.vectors), MEMBER_BLOCK):
            block_MD = self._members[start : start + MEMBER_BLOCK]
            heaps.add(queries_QD @ block_MD.T, query_rows_Q, torch.arange(start, start + len(block_MD)))
        return heaps.ids

    def _on_device(self, own: np.ndarray, k: int) -> np.ndarray:
        """Search with all vectors as one bucket."""
        device = self._members.device
        starts = torch.tensor([0, len(self.vectors)], device=device)
        rounds_RQ = torch.zeros(1, len(own), dtype=torch.int64, device=device)
        return top_k_by_rounds(self._members, starts, torch.from_numpy(own).to(device), rounds_RQ, k)


def exact_neighbors(
    queries: np.ndarray, own: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k nearest of a few queries among vectors that need not fit into memory at once.

    Args:
        queries: float32 [queries, dimension].
        own: int64 [queries], the id of each query, which is not its own neighbor.
        blocks: the vectors, block by block: ids int64 [block], ascending over all blocks, and float32 [block, dimension].
        k: neighbors of each query.

    Returns:
        int64 ids and float32 products, both [queries, k], greatest first; -1 and -inf where there are fewer.
    """
    ids, scores = np.zeros((len(queries), 0), dtype=np.int64), np.zeros((len(queries), 0), dtype=np.float32)
    queries_QD, query_rows_Q = torch.from_numpy(queries), torch.arange(len(queries))
    for block_ids, vectors in blocks:
        heaps = TopKHeaps(own, min(k + SPARE, len(block_ids)))
        heaps.add(queries_QD @ torch.from_numpy(vectors).T, query_rows_Q, torch.from_numpy(block_ids))
        local = np.where(heaps.ids == NO_NEIGHBOR, NO_NEIGHBOR, np.searchsorted(block_ids, heaps.ids))
        rows, products = rerank(vectors, queries, np.full(len(queries), NO_NEIGHBOR), local, k)
        ids = np.concatenate([ids, np.where(rows == NO_NEIGHBOR, NO_NEIGHBOR, block_ids[rows])], axis=1)
        ids, scores = take_top_k(ids, np.concatenate([scores, products], axis=1), k)
    return ids, scores


def concatenate_blocks(
    blocks: Iterator[tuple[np.ndarray, np.ndarray]], k: int, task: Task | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the blocks' ids and products, [block, k] each; `task` advances as blocks arrive."""
    ids, scores = [np.zeros((0, k), dtype=np.int64)], [np.zeros((0, k), dtype=np.float32)]
    for block_ids, products in blocks:
        ids.append(block_ids)
        scores.append(products)
        if task is not None:
            task.advance(len(block_ids))
    return np.concatenate(ids), np.concatenate(scores)


def growing_budgets(first: int, last: int) -> tuple[int, ...]:
    """Return search budgets from `first`, each about half as much more than the one before, to `last`."""
    budgets = []
    while first < last:
        budgets.append(first)
        first = max(first + 1, first * 3 // 2)
    return (*budgets, last)
