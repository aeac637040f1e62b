"""What the cells found, by document: the best neighbours of each over its cells, as pairs that either end may have found.

Being related is symmetric while "among the k nearest" is not: a pair that only one of the two found counts for both. So
whichever found it, a pair is laid down by the same one of its documents.
"""

from __future__ import annotations

import numpy as np

from sbp_fast.data.external_sort import read_all_between, write_rows
from sbp_fast.neighbors.partition import Merged
from sbp_fast.neighbors.partitioned_join import cell_sizes, found_path, members_path
from sbp_fast.neighbors.top_k import NOBODY
from sbp_fast.pairs.tasks import Pairing
from sbp_fast.pipeline.executors.executor import Advance
from sbp_fast.pipeline.files import save_array

EDGE = np.dtype([("first", "<i8"), ("second", "<i8"), ("similarity", "<f4")])


def in_order(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs as first and second, the same whichever is given as `one`; every document is first of half its pairs."""
    swap = ((one + other) % 2 == 0) == (one > other)
    return np.where(swap, other, one), np.where(swap, one, other)


def gather(pairing: Pairing, number: int, advance: Advance) -> None:
    """Write the pairs that the documents of a range found, by (first, second), each once; and how far each document's search
    reached, float32 [documents of the range]: the similarity of its last neighbour, -inf where it has fewer than k."""
    start, stop = pairing.ranges[number]
    merged = _merge(pairing, start, stop)
    save_array(pairing.file("reach", number), merged.similarities[:, -1])
    there = merged.ids.reshape(-1) != NOBODY
    own = np.repeat(np.arange(start, stop), merged.ids.shape[1])[there]
    first, second, places = _each_once(own, merged.ids.reshape(-1)[there], len(pairing.documents))
    scores = merged.similarities.reshape(-1)[there][places]
    write_rows(pairing.file("edges", number), EDGE, first=first, second=second, similarity=scores)


def gathered(pairing: Pairing, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs whose first document is in a range, whichever end found them, by (first, second).

    Returns:
        first and second int64, similarities float32, [pairs].
    """
    edges = read_all_between(pairing.files("edges"), EDGE, "first", *pairing.ranges[number])
    first, second, places = _each_once(edges["first"], edges["second"], len(pairing.documents))
    return first, second, edges["similarity"][places]


def reach(pairing: Pairing, documents: np.ndarray) -> np.ndarray:
    """How far the search of some documents reached (see `gather`). float32"""
    starts = np.array([start for start, _ in pairing.ranges])
    ranges = np.searchsorted(starts, documents, "right") - 1
    found = np.empty(len(documents), np.float32)
    for number in np.unique(ranges):
        here = ranges == number
        found[here] = np.load(pairing.file("reach", number), mmap_mode="r")[documents[here] - starts[number]]
    return found


def _merge(pairing: Pairing, start: int, stop: int) -> Merged:
    merged = Merged(stop - start, pairing.settings.neighbours)
    for cell in range(len(cell_sizes(pairing))):
        members = np.load(members_path(pairing, cell), mmap_mode="r")
        part = slice(*np.searchsorted(members, [start, stop]))
        found = np.load(found_path(pairing, cell), mmap_mode="r")[part]
        ids = np.where(found["member"] == NOBODY, NOBODY, members[found["member"]])
        merged.add(members[part] - start, ids, found["similarity"])
    return merged


def _each_once(one: np.ndarray, other: np.ndarray, documents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs in either direction -> first, second and a place among those given of each, in order."""
    first, second = in_order(one, other)
    keys, places = np.unique(first * documents + second, return_index=True)
    return keys // documents, keys % documents, places
