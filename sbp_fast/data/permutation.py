"""A keyed permutation of a range of integers, computed for one integer at a time, so that no shuffled order is stored."""

from __future__ import annotations

import xxhash
from numba import int64, njit, uint64

ROUNDS = 4


def key_of(*values: int) -> int:
    """Return the 64-bit key of some integers, such as a seed and an epoch."""
    return xxhash.xxh3_64_intdigest(b"".join(value.to_bytes(8, "little", signed=True) for value in values))


def permute(index: int, size: int, key: int) -> int:
    """Return the image of `index` under the permutation of range(size) that belongs to `key`, an unsigned 64-bit integer."""
    return int(permute_one(index, size, uint64(key)))


@njit(cache=True)
def permute_one(index, size, key):  # type: ignore[no-untyped-def]
    """Permute as `permute` does, for compiled code: int64, int64, uint64 -> int64.

    A Feistel network over the next power of four; results outside `size` are permuted again until they are inside (cycle
    walking, Black and Rogaway 2002), fewer than four times on average.
    """
    half = 1
    while (1 << 2 * half) < size:
        half += 1
    mask = uint64((1 << half) - 1)
    image = uint64(index)
    while True:
        left, right = image >> uint64(half), image & mask
        for feistel_round in range(ROUNDS):
            left, right = right, left ^ (mix(mix(key + uint64(feistel_round)) ^ right) & mask)
        image = left << uint64(half) | right
        if image < uint64(size):
            return int64(image)


@njit(cache=True)
def mix(value):  # type: ignore[no-untyped-def]
    """Apply the finalizer of splitmix64 (Steele, Lea and Flood 2014): each bit of the result depends on each of `value`."""
    value = uint64(value)
    value = (value ^ (value >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> uint64(27))) * uint64(0x94D049BB133111EB)
    return value ^ (value >> uint64(31))
