"""Candidate pairs of similar documents by locality-sensitive hashing: those that share the key of a MinHash band.

Keys lie in files and are compared one range of hashes at a time. Memory holds `HASHES_IN_MEMORY` keys with their documents, and
16 bytes for each candidate pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sbp_fast.data.holdout import hash_ranges


def candidate_pairs(files: Sequence[Path]) -> np.ndarray:
    """Pair every document with the first of its key and with the one before it, which keeps the pairs linear.

    Args:
        files: each a saved uint64 array [1 + bands, documents]: the documents' indices, then their key in each band.

    Returns:
        uint64 [pairs, 2], the lower index first; sorted, each pair once.
    """
    shapes = [np.load(file, mmap_mode="r").shape for file in files]
    pairs = np.zeros((0, 2), np.uint64)
    for band in range(1, shapes[0][0] if shapes else 0):
        parts = [pairs]
        for low, high in hash_ranges(sum(documents for _, documents in shapes)):
            keys, indices = (np.concatenate(columns) for columns in zip(*_in_range(files, band, low, high), strict=True))
            order = np.lexsort((indices, keys))
            keys, indices = keys[order], indices[order]
            repeated = np.flatnonzero(keys[1:] == keys[:-1]) + 1
            first = np.searchsorted(keys, keys[repeated])
            parts += [np.stack([indices[other], indices[repeated]], 1) for other in (first, repeated - 1)]
        pairs = np.unique(np.concatenate(parts), axis=0)
    return pairs


def _in_range(files: Sequence[Path], band: int, low: int, high: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for file in files:
        stored = np.load(file, mmap_mode="r")
        inside = (stored[band] >= np.uint64(low)) & (stored[band] <= np.uint64(high))
        yield stored[band][inside], stored[0][inside]
