"""Containment of many texts in a corpus that may exceed memory: a hash table of shingles, one range of hashes at a time.

Texts come in batches: their tokens, <begin> and <end> of each text included, and where each text starts. A text shorter than a
shingle has none. Two bits of each hash hold its label, so two shingles are confused with probability 2^-62.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numba import njit

from sbp_fast.dedup.shingles import window_hashes

Batch: TypeAlias = tuple[np.ndarray, np.ndarray]
MINIMUM_SLOTS = 1 << 16
LOAD = 0.5  # share of the slots expected to be taken; above it a search visits many
FULL = 0.9
ALL_HASHES = (0, (1 << 64) - 1)


class ShingleIndex:
    """The shingles of some texts, each with a label of 0 or 1.

    Args:
        width: tokens of a shingle.
        slots: of the table, eight bytes each; a power of two.
        hashes: the smallest and the largest hash that are looked at.
    """

    def __init__(self, width: int, slots: int, hashes: tuple[int, int] = ALL_HASHES) -> None:
        self.width, self._slots, self._taken = width, np.zeros(slots, np.uint64), 0
        self._low, self._high = map(np.uint64, hashes)

    def add(self, batches: Iterable[Batch], label: int) -> None:
        """Add the shingles of texts; a shingle that is in the table keeps its label.

        Raises:
            RuntimeError: more shingles than the table was made for.
        """
        for tokens, offsets in batches:
            arguments = _integers(tokens), offsets, self.width, self._low, self._high, np.uint64(label)
            self._taken = _add(self._slots, self._taken, *arguments)
            if self._taken > FULL * len(self._slots):
                raise RuntimeError(f"a table of {len(self._slots)} slots is too small for its shingles")

    def mark(self, batches: Iterable[Batch], label: int) -> None:
        """Change the label of those shingles of texts that are in the table."""
        for tokens, offsets in batches:
            _mark(self._slots, _integers(tokens), offsets, self.width, self._low, self._high, np.uint64(label))

    def count(self, batch: Batch) -> np.ndarray:
        """Count each text's distinct shingles in the range of hashes: all, those with label 0, those with label 1.

        Returns:
            int64 [texts, 3].
        """
        return _count(self._slots, _integers(batch[0]), batch[1], self.width, self._low, self._high)


def plan_passes(shingles: int, memory: float) -> tuple[int, list[tuple[int, int]]]:
    """Return the slots of a table of at most `memory` bytes, and the ranges of hashes that it holds one after the other."""
    largest = max(MINIMUM_SLOTS, 1 << int(np.log2(max(memory / 8, 1))))
    passes = max(1, -(-shingles // int(LOAD * largest)))
    edges = [(index << 64) // passes for index in range(passes + 1)]
    return min(slots_for(shingles), largest), [(low, high - 1) for low, high in pairwise(edges)]


def slots_for(shingles: int) -> int:
    """Return the slots of a table that holds so many shingles."""
    return max(MINIMUM_SLOTS, 1 << int(np.ceil(np.log2(max(shingles / LOAD, 1)))))


def shingle_positions(offsets: np.ndarray, width: int) -> int:
    """Count the runs of `width` tokens in texts, repeated ones included.

    Args:
        offsets: int64 [texts + 1], where each text starts, <begin> and <end> of each included.
        width: tokens of a shingle.
    """
    return int(np.maximum(np.diff(offsets) - 1 - width, 0).sum())


def _integers(tokens: np.ndarray) -> np.ndarray:
    return tokens.astype(np.uint32, copy=False)  # one type, so that one compiled version serves


@njit(cache=True, nogil=True)
def _slot(slots, hash):  # type: ignore[no-untyped-def]
    """Return the slot of a hash, or the empty slot where it belongs."""
    mask = np.uint64(len(slots) - 1)
    slot = (hash >> np.uint64(2)) & mask
    while slots[slot] != 0 and (slots[slot] ^ hash) >> np.uint64(2) != 0:
        slot = (slot + np.uint64(1)) & mask
    return slot


@njit(cache=True, nogil=True)
def _labelled(hash, label):  # type: ignore[no-untyped-def]
    """Return a slot's content: a hash with its label in the lowest bit; the next bit is set, so that no taken slot is 0."""
    return (hash & ~np.uint64(3)) | np.uint64(2) | label


@njit(cache=True, nogil=True)
def _hashes(tokens, offsets, text, width):  # type: ignore[no-untyped-def]
    body = tokens[offsets[text] + 1 : offsets[text + 1] - 1]
    return window_hashes(body, width) if len(body) >= width else np.zeros(0, np.uint64)


@njit(cache=True, nogil=True)
def _add(slots, taken, tokens, offsets, width, low, high, label):  # type: ignore[no-untyped-def]
    """Add shingles; returns the number of slots taken."""
    for text in range(len(offsets) - 1):
        for hash in _hashes(tokens, offsets, text, width):
            if low <= hash <= high:
                slot = _slot(slots, hash)
                if slots[slot] == 0:
                    slots[slot] = _labelled(hash, label)
                    taken += 1
                    if taken > FULL * len(slots):  # a search in a full table has no end
                        return taken
    return taken


@njit(cache=True, nogil=True)
def _mark(slots, tokens, offsets, width, low, high, label):  # type: ignore[no-untyped-def]
    for text in range(len(offsets) - 1):
        for hash in _hashes(tokens, offsets, text, width):
            if low <= hash <= high:
                slot = _slot(slots, hash)
                if slots[slot] != 0:
                    slots[slot] = _labelled(hash, label)


@njit(cache=True, nogil=True)
def _count(slots, tokens, offsets, width, low, high):  # type: ignore[no-untyped-def]
    counts = np.zeros((len(offsets) - 1, 3), np.int64)
    for text in range(len(offsets) - 1):
        hashes = _hashes(tokens, offsets, text, width)
        hashes = np.sort(hashes[(hashes >= low) & (hashes <= high)])
        for index in range(len(hashes)):
            if index > 0 and hashes[index] == hashes[index - 1]:
                continue
            counts[text, 0] += 1
            slot = _slot(slots, hashes[index])
            if slots[slot] != 0:
                counts[text, 1 + int(slots[slot] & np.uint64(1))] += 1
    return counts
