"""Items of known sizes, placed whole in bins of one capacity: documents in training streams, seeds with their partners.

Placed once, by best fit in a random order: each item goes where it leaves the least room, the small ones last, since they
fill what the others leave. That gives every bin a list of sizes, the same in every epoch. Which items of a size stand in the
places of that size is a permutation of its own in each epoch, so that a document meets other company each time, and still
every item is in exactly one bin. All of it is computed for one bin at a time; what is stored is a few integers an item.
"""

from __future__ import annotations

import numpy as np
from numba import int64, njit, uint64

from sbp_fast.data.permutation import key_of, mix, permute_one

SMALL = 8  # an item of at most this part of the capacity; 4 to 16 leave about half the padding of one random order


class Packing:
    """Where items stand.

    Args:
        sizes: int [items], each from 1 to `capacity`.
        capacity: of a bin.
        seed: of the order in which items are placed, and of the permutations.

    Attributes:
        bins: how many there are.
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
        bin_of, self.bins = place(sizes, capacity, uint64(key_of(seed)))
        by_bin = np.argsort(bin_of, kind="stable").astype(np.uint32)
        self._bin_starts = np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=self.bins))])
        self._by_size = np.argsort(sizes, kind="stable").astype(np.uint32)
        self._size_starts = np.concatenate([[0], np.cumsum(np.bincount(sizes, minlength=capacity + 1))])
        rank = np.empty(len(sizes), np.uint32)
        rank[self._by_size] = np.arange(len(sizes), dtype=np.uint32)
        self._places = rank[by_bin]  # each place in a bin, as a place in the order by size
        self._sizes = sizes

    @property
    def padding_share(self) -> float:
        """Share of all bins' room that stays empty."""
        return 1 - self.filled / (self.bins * self.capacity)

    def items(self, number: int, epoch: int) -> np.ndarray:
        """The items of bin `number` in an epoch, int64, together no more than `capacity`."""
        places = self._places[self._bin_starts[number] : self._bin_starts[number + 1]]
        return draw(places, self._by_size, self._sizes, self._size_starts, uint64(key_of(self.seed, epoch)))


@njit(cache=True)
def place(sizes, capacity, key):  # type: ignore[no-untyped-def]
    """The bin of each item, int32 [items], and the number of bins: best fit in the order that `key` gives."""
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
            number, room = bins, capacity
            bins += 1
        else:
            number = last_with_room[room]
            last_with_room[room] = before[number]
            if last_with_room[room] < 0:
                some[room >> 6] &= ~(uint64(1) << uint64(room & 63))
        bin_of[item] = number
        room -= sizes[item]
        if room > 0:
            before[number], last_with_room[room] = last_with_room[room], number
            some[room >> 6] |= uint64(1) << uint64(room & 63)
    return bin_of, bins


@njit(cache=True)
def least_room(some, size):  # type: ignore[no-untyped-def]
    """The smallest marked number that is at least `size`, or -1."""
    word = size >> 6
    found = some[word] >> uint64(size & 63) << uint64(size & 63)
    while found == 0:
        word += 1
        if word == len(some):
            return int64(-1)
        found = some[word]
    bit = word << 6
    while not found & uint64(1):
        found >>= uint64(1)
        bit += 1
    return int64(bit)


@njit(cache=True, nogil=True)
def draw(places, by_size, sizes, size_starts, key):  # type: ignore[no-untyped-def]
    """Which item stands in each of `places` in the epoch that `key` belongs to."""
    items = np.empty(len(places), np.int64)
    for index, at in enumerate(places):
        size = sizes[by_size[at]]
        first, count = size_starts[size], size_starts[size + 1] - size_starts[size]
        items[index] = by_size[first + permute_one(at - first, count, mix(key ^ uint64(size)))]
    return items
