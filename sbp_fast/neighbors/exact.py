"""The self-join by all products: the reference that the others are measured against, and the fastest for few vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from sbp_fast.neighbors.blocks import in_blocks
from sbp_fast.neighbors.top_k import NOBODY, HeapBest, best_by_rounds, keep_best, rank
from sbp_fast.pipeline.progress import Task

QUERIES, MEMBERS = {"cpu": 512, "cuda": 65_536}, 4096
SPARE = 8  # found beyond k, so that the rounding of a matrix product does not decide who is among the k


class ExactJoin:
    """Every query against every member, a tile of products at a time.

    Args:
        vectors: float32 [documents, dimension], unit norm.
    """

    efforts: tuple[int, ...] = ()

    def __init__(self, vectors: np.ndarray, *, threads: int, device: str = "cpu") -> None:
        self.vectors, self.threads = vectors, threads
        self.device = torch.device(device).type
        self._members = torch.from_numpy(vectors).to(device)

    def search(
        self, rows: np.ndarray, k: int, effort: int | None = None, task: Task | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k other members nearest to each of the members `rows`: ids int64 and products float32, [rows, k]."""

        def work(part: slice) -> tuple[np.ndarray, np.ndarray]:
            own, kept = rows[part], min(k + SPARE, len(self.vectors))
            found = self._on_cpu(own, kept) if self.device == "cpu" else self._on_device(own, kept)
            return rank(self.vectors, self.vectors[own], own, found, k)

        return collect(in_blocks(len(rows), QUERIES[self.device], work, self.threads), k, task)

    def _on_cpu(self, own: np.ndarray, k: int) -> np.ndarray:
        found = HeapBest(own, k)
        queries_QD, places_Q = self._members[own], torch.arange(len(own))
        for start in range(0, len(self.vectors), MEMBERS):
            block_MD = self._members[start : start + MEMBERS]
            found.add(queries_QD @ block_MD.T, places_Q, torch.arange(start, start + len(block_MD)))
        return found.ids

    def _on_device(self, own: np.ndarray, k: int) -> np.ndarray:
        """All members are one bucket."""
        device = self._members.device
        starts = torch.tensor([0, len(self.vectors)], device=device)
        rounds_RQ = torch.zeros(1, len(own), dtype=torch.int64, device=device)
        return best_by_rounds(self._members, starts, torch.from_numpy(own).to(device), rounds_RQ, k)


def exact_neighbours(
    queries: np.ndarray, own: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k members nearest to a few queries, among more members than need lie in memory.

    Args:
        queries: float32 [queries, dimension].
        own: int64 [queries], the member that each query is, which is not its own neighbour.
        blocks: of members, their ids int64 [members], ascending over all blocks, and vectors float32 [members, dimension].

    Returns:
        int64 ids and float32 products, both [queries, k], greatest first; -1 and -inf where there are no more.
    """
    ids, scores = np.zeros((len(queries), 0), dtype=np.int64), np.zeros((len(queries), 0), dtype=np.float32)
    queries_QD, places_Q = torch.from_numpy(queries), torch.arange(len(queries))
    for members, vectors in blocks:
        found = HeapBest(own, min(k + SPARE, len(members)))
        found.add(queries_QD @ torch.from_numpy(vectors).T, places_Q, torch.from_numpy(members))
        local = np.where(found.ids == NOBODY, NOBODY, np.searchsorted(members, found.ids))
        places, products = rank(vectors, queries, np.full(len(queries), NOBODY), local, k)
        ids = np.concatenate([ids, np.where(places == NOBODY, NOBODY, members[places])], axis=1)
        ids, scores = keep_best(ids, np.concatenate([scores, products], axis=1), k)
    return ids, scores


def collect(parts: Iterator[tuple[np.ndarray, np.ndarray]], k: int, task: Task | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The blocks' ids and products as one array each, told to `task` as they come."""
    ids, scores = [np.zeros((0, k), dtype=np.int64)], [np.zeros((0, k), dtype=np.float32)]
    for found, products in parts:
        ids.append(found)
        scores.append(products)
        if task is not None:
            task.advance(len(found))
    return np.concatenate(ids), np.concatenate(scores)


def growing(first: int, last: int) -> list[int]:
    """`first`, about half as much more each time, and `last`."""
    efforts = []
    while first < last:
        efforts.append(first)
        first = max(first + 1, first * 3 // 2)
    return [*efforts, last]
