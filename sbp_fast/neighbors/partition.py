"""More vectors than one join should hold: each goes to its nearest few cells, and every cell is joined by itself.

A pair is found if the two share a cell, which near ones mostly do when each is in its nearest two or three (measured in
docs/log.md). Shards that everyone asks would cost as many times more as there are shards.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from sbp_fast.neighbors.kmeans import balancing_prices, nearest_centroids, train_centroids
from sbp_fast.neighbors.top_k import NOBODY, keep_best
from sbp_fast.neighbors.vectors import READ_BLOCK, Vectors

SAMPLED = 256  # vectors a cell that the router is trained on
RANKED = 8  # cells looked at for each that a vector goes to, before all are
FILLED = 0.6  # of a cell's room, on average: the rest is for cells that the balance does not make equal


def route(vectors: Vectors, capacity: int, overlap: int, *, seed: int, threads: int) -> list[np.ndarray]:
    """The members of each cell: every vector is in its nearest `overlap` cells that have room.

    Args:
        capacity: vectors that a cell holds at most; with no more than this in all there is one cell.

    Returns:
        For each cell int64 rows of `vectors`, ascending.
    """
    if len(vectors) <= capacity:
        return [np.arange(len(vectors))]
    count = max(overlap, math.ceil(len(vectors) * overlap / (FILLED * capacity)))
    sample = np.sort(np.random.default_rng(seed).permutation(len(vectors))[: SAMPLED * count])
    known = vectors[sample]
    centroids = train_centroids(known, count, seed=seed, threads=threads)
    most = capacity * len(known) / len(vectors)
    prices = balancing_prices(known, centroids, overlap, most, threads=threads)
    room = np.full(count, capacity)
    members: list[list[np.ndarray]] = [[] for _ in range(count)]
    for start in range(0, len(vectors), READ_BLOCK):
        rows = np.arange(start, min(start + READ_BLOCK, len(vectors)))
        chosen = _choose(vectors[rows], centroids, overlap, prices, room, threads)
        order = np.argsort(chosen, axis=None, kind="stable")
        ends = np.searchsorted(chosen.reshape(-1)[order], np.arange(count), "right")
        for cell, part in enumerate(np.split(rows[order // overlap], ends[:-1])):
            members[cell].append(part)
    return [np.concatenate(parts) for parts in members]


def _choose(
    vectors: np.ndarray, centroids: np.ndarray, overlap: int, prices: np.ndarray, room: np.ndarray, threads: int
) -> np.ndarray:
    """The nearest `overlap` cells with room of each vector, whose room is taken. int64 [vectors, overlap]"""
    chosen = np.full((len(vectors), overlap), NOBODY)
    for ranks in (min(len(centroids), RANKED * overlap), len(centroids)):
        short = np.flatnonzero(chosen[:, -1] == NOBODY)  # of all in the first turn; few find the nearest cells full
        if len(short):
            ranked = nearest_centroids(vectors[short], centroids, ranks, threads=threads, prices=prices)
            chosen[short] = _take_room(ranked, chosen[short], room)
    return chosen


@numba.njit(cache=True)
def _take_room(ranked: np.ndarray, chosen: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Fill up each row of `chosen` with the first cells of its ranking that have room and are not yet in it."""
    for row in range(len(ranked)):
        taken = (chosen[row] != NOBODY).sum()
        for cell in ranked[row]:
            if taken == chosen.shape[1]:
                break
            if room[cell] > 0 and not (chosen[row] == cell).any():
                chosen[row, taken] = cell
                room[cell] -= 1
                taken += 1
    return chosen


class Merged:
    """The best k neighbours of each document over the cells that it was in.

    Attributes:
        ids: int64 [documents, k]; -1 where there are fewer.
        similarities: float32 [documents, k]; -inf where there are fewer.
    """

    def __init__(self, documents: int, k: int) -> None:
        self.ids = np.full((documents, k), NOBODY)
        self.similarities = np.full((documents, k), -np.inf, dtype=np.float32)

    def add(self, rows: np.ndarray, ids: np.ndarray, similarities: np.ndarray) -> None:
        """What one cell found for its members `rows`: ids int64 and similarities float32, [rows, k]."""

        for start in range(0, len(rows), READ_BLOCK):
            part = slice(start, start + READ_BLOCK)
            own = rows[part]
            joined = np.concatenate([self.ids[own], ids[part]], axis=1)
            scores = np.concatenate([self.similarities[own], similarities[part]], axis=1)
            order = np.argsort(joined, axis=1, kind="stable")
            joined, scores = np.take_along_axis(joined, order, axis=1), np.take_along_axis(scores, order, axis=1)
            scores[:, 1:][joined[:, 1:] == joined[:, :-1]] = -np.inf  # found in an earlier cell, too
            self.ids[own], self.similarities[own] = keep_best(joined, scores, self.ids.shape[1])
