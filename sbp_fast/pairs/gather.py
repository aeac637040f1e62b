"""Candidate pairs gathered from the neighbors that all partitions found, each pair once.

Being related is symmetric while "among the k nearest" is not: a pair that only one of its documents found counts for both. So
whichever found it, a pair is stored by the same one of them.
"""

from __future__ import annotations

import numpy as np

from sbp_fast.data.external_sort import read_all_between, write_rows
from sbp_fast.neighbors.partition import MergedNeighbors
from sbp_fast.neighbors.top_k import NO_NEIGHBOR
from sbp_fast.pairs.partitioned_self_join import members_path, neighbors_path, partition_sizes
from sbp_fast.pairs.tasks import Pairing
from sbp_fast.pipeline.executors.executor import Advance
from sbp_fast.pipeline.files import save_array
from sbp_fast.pipeline.seals import seal

EDGE = np.dtype([("first", "<i8"), ("second", "<i8"), ("similarity", "<f4")])


def canonical_order(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order the documents of each pair as first and second, the same from either side; each is first of half its pairs."""
    swap = ((left + right) % 2 == 0) == (left > right)
    return np.where(swap, right, left), np.where(swap, left, right)


def gather(pairing: Pairing, number: int, advance: Advance) -> None:
    """Write the pairs that the documents of a range found, by (first, second), each once, and the reach of each document.

    The reach is float32 [documents of the range]: the similarity of the last neighbor, -inf where there are fewer than k.
    """
    start, stop = pairing.ranges[number]
    merged = _merge(pairing, start, stop)
    save_array(pairing.file("reach", number), merged.similarities[:, -1])
    present = merged.ids.reshape(-1) != NO_NEIGHBOR
    own = np.repeat(np.arange(start, stop), merged.ids.shape[1])[present]
    first, second, indices = _deduplicate(own, merged.ids.reshape(-1)[present], len(pairing.documents))
    scores = merged.similarities.reshape(-1)[present][indices]
    write_rows(pairing.file("edges", number), EDGE, first=first, second=second, similarity=scores)
    seal(pairing.file("edges", number), pairing.file("reach", number))


def read_edges(pairing: Pairing, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the pairs whose first document is in a range, whichever document found them, by (first, second).

    Returns:
        first and second int64, similarities float32, [pairs].
    """
    edges = read_all_between(pairing.files("edges"), EDGE, "first", *pairing.ranges[number])
    first, second, indices = _deduplicate(edges["first"], edges["second"], len(pairing.documents))
    return first, second, edges["similarity"][indices]


def read_reach(pairing: Pairing, documents: np.ndarray) -> np.ndarray:
    """Read the reach of some documents (see `gather`). float32 [documents]."""
    starts = np.array([start for start, _ in pairing.ranges])
    ranges = np.searchsorted(starts, documents, "right") - 1
    reach = np.empty(len(documents), np.float32)
    for number in np.unique(ranges):
        here = ranges == number
        reach[here] = np.load(pairing.file("reach", number), mmap_mode="r")[documents[here] - starts[number]]
    return reach


def _merge(pairing: Pairing, start: int, stop: int) -> MergedNeighbors:
    merged = MergedNeighbors(stop - start, pairing.settings.neighbors)
    for partition in range(len(partition_sizes(pairing))):
        members = np.load(members_path(pairing, partition), mmap_mode="r")
        part = slice(*np.searchsorted(members, [start, stop]))
        neighbors = np.load(neighbors_path(pairing, partition), mmap_mode="r")[part]
        ids = np.where(neighbors["member"] == NO_NEIGHBOR, NO_NEIGHBOR, members[neighbors["member"]])
        merged.add(members[part] - start, ids, neighbors["similarity"])
    return merged


def _deduplicate(left: np.ndarray, right: np.ndarray, documents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return first, second and an index into the input of each pair, given in either direction, in order."""
    first, second = canonical_order(left, right)
    keys, indices = np.unique(first * documents + second, return_index=True)
    return keys // documents, keys % documents, indices
