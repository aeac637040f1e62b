"""Partitions of more vectors than one self-join should hold: each vector goes to its nearest few, each is searched alone.

A pair is found if its two vectors share a partition. Near ones mostly do when each is in its nearest two or three (measured
in docs/log.md). Shards that every query searches would cost as many times more as there are shards.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from sbp_fast.neighbors.kmeans import balancing_prices, nearest_centroids, train_centroids
from sbp_fast.neighbors.top_k import NO_NEIGHBOR, take_top_k
from sbp_fast.neighbors.vectors import READ_BLOCK, Vectors

UNASSIGNED = -1
TRAINING_VECTORS = 256  # a partition, on which the centroids are trained
RANKED = 8  # partitions ranked for each that a vector goes to, before all are ranked
FILL = 0.6  # of a partition's capacity, on average: the rest is for partitions that the balance does not make equal


def assign_partitions(vectors: Vectors, capacity: int, overlap: int, *, seed: int, threads: int) -> list[np.ndarray]:
    """Assign every vector to its nearest `overlap` partitions that have room.

    Args:
        vectors: all of them; read block by block.
        capacity: vectors of a partition at most; where there are no more than this in all, there is one partition.
        overlap: partitions of each vector.
        seed: of the sample on which the partitions' centroids are trained.
        threads: of the CPU; the result does not depend on it.

    Returns:
        For each partition int64 rows of `vectors`, ascending.
    """
    if len(vectors) <= capacity:
        return [np.arange(len(vectors))]
    count = max(overlap, math.ceil(len(vectors) * overlap / (FILL * capacity)))
    sample_rows = np.sort(np.random.default_rng(seed).permutation(len(vectors))[: TRAINING_VECTORS * count])
    sample = vectors[sample_rows]
    centroids = train_centroids(sample, count, seed=seed, threads=threads)
    sample_capacity = capacity * len(sample) / len(vectors)
    prices = balancing_prices(sample, centroids, overlap, sample_capacity, threads=threads)
    room = np.full(count, capacity)
    members: list[list[np.ndarray]] = [[] for _ in range(count)]
    for start in range(0, len(vectors), READ_BLOCK):
        rows = np.arange(start, min(start + READ_BLOCK, len(vectors)))
        chosen = _choose(vectors[rows], centroids, overlap, prices, room, threads)
        order = np.argsort(chosen, axis=None, kind="stable")
        ends = np.searchsorted(chosen.reshape(-1)[order], np.arange(count), "right")
        for partition, part in enumerate(np.split(rows[order // overlap], ends[:-1])):
            members[partition].append(part)
    return [np.concatenate(parts) for parts in members]


def _choose(
    vectors: np.ndarray, centroids: np.ndarray, overlap: int, prices: np.ndarray, room: np.ndarray, threads: int
) -> np.ndarray:
    """Take room in the nearest `overlap` partitions of each vector that have some. int64 [vectors, overlap]."""
    chosen = np.full((len(vectors), overlap), UNASSIGNED)
    for ranks in (min(len(centroids), RANKED * overlap), len(centroids)):
        unfinished = np.flatnonzero(chosen[:, -1] == UNASSIGNED)  # all at first; then few, whose nearest partitions are full
        if len(unfinished):
            ranked = nearest_centroids(vectors[unfinished], centroids, ranks, threads=threads, prices=prices)
            chosen[unfinished] = _take_room(ranked, chosen[unfinished], room)
    return chosen


@numba.njit(cache=True)
def _take_room(ranked: np.ndarray, chosen: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Fill each row of `chosen` with the first partitions of its ranking that have room and are not in it yet."""
    for row in range(len(ranked)):
        taken = (chosen[row] != UNASSIGNED).sum()
        for partition in ranked[row]:
            if taken == chosen.shape[1]:
                break
            if room[partition] > 0 and not (chosen[row] == partition).any():
                chosen[row, taken] = partition
                room[partition] -= 1
                taken += 1
    return chosen


class MergedNeighbors:
    """The k nearest neighbors of each document over all partitions that it is in.

    Attributes:
        ids: int64 [documents, k]; -1 where there are fewer.
        similarities: float32 [documents, k]; -inf where there are fewer.
    """

    def __init__(self, documents: int, k: int) -> None:
        self.ids = np.full((documents, k), NO_NEIGHBOR)
        self.similarities = np.full((documents, k), -np.inf, dtype=np.float32)

    def add(self, rows: np.ndarray, ids: np.ndarray, similarities: np.ndarray) -> None:
        """Add the neighbors of the documents `rows` in one partition: ids int64 and similarities float32, [rows, k]."""
        for start in range(0, len(rows), READ_BLOCK):
            part = slice(start, start + READ_BLOCK)
            own = rows[part]
            merged = np.concatenate([self.ids[own], ids[part]], axis=1)
            scores = np.concatenate([self.similarities[own], similarities[part]], axis=1)
            order = np.argsort(merged, axis=1, kind="stable")
            merged, scores = np.take_along_axis(merged, order, axis=1), np.take_along_axis(scores, order, axis=1)
            scores[:, 1:][merged[:, 1:] == merged[:, :-1]] = -np.inf  # found in an earlier partition, too
            self.ids[own], self.similarities[own] = take_top_k(merged, scores, self.ids.shape[1])
