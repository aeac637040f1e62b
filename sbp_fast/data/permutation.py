"""A keyed permutation of any range of integers, computed for one of them at a time: a shuffled order nobody has to store."""

from __future__ import annotations

import xxhash
from numba import int64, njit, uint64

ROUNDS = 4


def key_of(*values: int) -> int:
    """The 64-bit key of some integers, such as a seed and the number of an epoch."""
    return xxhash.xxh3_64_intdigest(b"".join(value.to_bytes(8, "little", signed=True) for value in values))


def permute(index: int, size: int, key: int) -> int:
    """Where the permutation of range(size) that belongs to `key`, an unsigned 64-bit integer, takes `index`."""
    return int(permute_one(index, size, uint64(key)))


@njit(cache=True)
def permute_one(index, size, key):  # type: ignore[no-untyped-def]
    """`permute` for compiled code: int64, int64, uint64 -> int64.

    A Feistel network over the next power of four; results beyond `size` walk on until they are inside (Black and Rogaway
    2002), fewer than four steps on average.
    """
    half = 1
    while (1 << 2 * half) < size:
        half += 1
    mask = uint64((1 << half) - 1)
    place = uint64(index)
    while True:
        left, right = place >> uint64(half), place & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (mix(mix(key + uint64(number)) ^ right) & mask)
        place = left << uint64(half) | right
        if place < uint64(size):
            return int64(place)


@njit(cache=True)
def mix(value):  # type: ignore[no-untyped-def]
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): each bit of the result depends on each of `value`."""
    value = uint64(value)
    value = (value ^ (value >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> uint64(27))) * uint64(0x94D049BB133111EB)
    return value ^ (value >> uint64(31))
