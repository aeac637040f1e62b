"""Bin packing: items of known sizes placed whole in bins of one capacity, such as documents in packed sequences.

Best fit in a random order, done once: each item goes where it leaves the least room, small items last, since they fill what the
others leave. That gives every bin a list of sizes, the same in every epoch. A permutation for each size and epoch decides which
items of a size go to the positions of that size, so that a document is packed with others each time, and still every item is in
exactly one bin. Items are computed for one bin at a time; a few integers an item are stored.
"""

from __future__ import annotations

import numpy as np
from numba import int64, njit, uint64

from sbp_fast.data.permutation import key_of, mix, permute_one

SMALL = 8  # a small item is at most capacity / SMALL; 4 to 16 leave about half the padding of one random order


class Packing:
    """Items packed into bins.

    Args:
        sizes: int [items], each from 1 to `capacity`.
        capacity: of a bin.
        seed: of the order in which items are placed, and of the permutations.

    Attributes:
        bins: their number.
        filled: sum of the sizes.

    Raises:
        ValueError: no items, or one of a size out of range.
    """

    def __init__(self, sizes: np.ndarray, capacity: int, seed: int) -> None:
        if len(sizes) == 0:
            raise ValueError("nothing to pack")
        if sizes.min() < 1 or sizes.max() > capacity:
            raise ValueError(f"sizes must be from 1 to {capacity}: got {sizes.min()} to {sizes.max()}")
        self.capacity, self.seed, self.filled = capacity, seed, int(sizes.sum())
        sizes = sizes.astype(np.int32)
        bin_of, self.bins = best_fit(sizes, capacity, uint64(key_of(seed)))
        by_bin = np.argsort(bin_of, kind="stable").astype(np.uint32)
        self._bin_starts = np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=self.bins))])
        self._by_size = np.argsort(sizes, kind="stable").astype(np.uint32)
        self._size_starts = np.concatenate([[0], np.cumsum(np.bincount(sizes, minlength=capacity + 1))])
        rank = np.empty(len(sizes), np.uint32)
        rank[self._by_size] = np.arange(len(sizes), dtype=np.uint32)
        self._ranks = rank[by_bin]  # for each position of all bins, a rank in the order by size
        self._sizes = sizes

    @property
    def padding_share(self) -> float:
        """Share of the bins' capacity that stays empty."""
        return 1 - self.filled / (self.bins * self.capacity)

    def items(self, index: int, epoch: int) -> np.ndarray:
        """Return the items of bin `index` in an epoch, together no larger than `capacity`. int64 [items]."""
        ranks = self._ranks[self._bin_starts[index] : self._bin_starts[index + 1]]
        return permute_items(ranks, self._by_size, self._sizes, self._size_starts, uint64(key_of(self.seed, epoch)))


@njit(cache=True)
def best_fit(sizes, capacity, key):  # type: ignore[no-untyped-def]
    """Pack items by best fit, in the order that `key` gives.

    Returns:
        The bin of each item, int32 [items], and the number of bins.
    """
    bin_of = np.empty(len(sizes), np.int32)
    last_with_room = np.full(capacity + 1, -1, np.int32)  # for each amount of room, the last of a chain of bins that have it
    before = np.empty(len(sizes), np.int32)  # the chains
    some = np.zeros(capacity // 64 + 1, np.uint64)  # a bit for each amount of room that some bin has
    bins = 0
    for turn in range(2 * len(sizes)):
        item = permute_one(turn % len(sizes), len(sizes), key)
        if (SMALL * sizes[item] <= capacity) != (turn >= len(sizes)):
            continue
        room = least_room(some, sizes[item])
        if room < 0:
            chosen, room = bins, capacity
            bins += 1
        else:
            chosen = last_with_room[room]
            last_with_room[room] = before[chosen]
            if last_with_room[room] < 0:
                some[room >> 6] &= ~(uint64(1) << uint64(room & 63))
        bin_of[item] = chosen
        room -= sizes[item]
        if room > 0:
            before[chosen], last_with_room[room] = last_with_room[room], chosen
            some[room >> 6] |= uint64(1) << uint64(room & 63)
    return bin_of, bins


@njit(cache=True)
def least_room(some, size):  # type: ignore[no-untyped-def]
    """Return the smallest number marked in the bits of `some` that is at least `size`, or -1."""
    word = size >> 6
    marked = some[word] >> uint64(size & 63) << uint64(size & 63)
    while marked == 0:
        word += 1
        if word == len(some):
            return int64(-1)
        marked = some[word]
    bit = word << 6
    while not marked & uint64(1):
        marked >>= uint64(1)
        bit += 1
    return int64(bit)


@njit(cache=True, nogil=True)
def permute_items(ranks, by_size, sizes, size_starts, key):  # type: ignore[no-untyped-def]
    """Return the item at each position in the epoch that `key` belongs to; ranks are positions in the order by size."""
    items = np.empty(len(ranks), np.int64)
    for index, rank in enumerate(ranks):
        size = sizes[by_size[rank]]
        first, count = size_starts[size], size_starts[size + 1] - size_starts[size]
        items[index] = by_size[first + permute_one(rank - first, count, mix(key ^ uint64(size)))]
    return items
