"""Which documents may be much alike, by the keys of their MinHash bands that lie in files: a run of hashes at a time.

What is held in one place is a run of `SORTED_AT_ONCE` keys with their documents, and 16 bytes for a pair of candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sbp_fast.data.holdout import hash_runs


def candidate_pairs(files: Sequence[Path]) -> np.ndarray:
    """In each group with one key every document with the first and with the one before it, which keeps pairs linear.

    Args:
        files: each uint64 [1 + keys, documents] as numpy writes it: the documents' numbers, then their keys.

    Returns:
        uint64 [pairs, 2], the lower number first; sorted, each pair once.
    """
    shapes = [np.load(file, mmap_mode="r").shape for file in files]
    found = np.zeros((0, 2), np.uint64)
    for band in range(1, shapes[0][0] if shapes else 0):
        new = [found]
        for low, high in hash_runs(sum(documents for _, documents in shapes)):
            keys, numbers = (np.concatenate(parts) for parts in zip(*_in_range(files, band, low, high), strict=True))
            order = np.lexsort((numbers, keys))
            keys, numbers = keys[order], numbers[order]
            again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
            first = np.searchsorted(keys, keys[again])
            new += [np.stack([numbers[other], numbers[again]], 1) for other in (first, again - 1)]
        found = np.unique(np.concatenate(new), axis=0)
    return found


def _in_range(files: Sequence[Path], band: int, low: int, high: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for file in files:
        stored = np.load(file, mmap_mode="r")
        inside = (stored[band] >= np.uint64(low)) & (stored[band] <= np.uint64(high))
        yield stored[band][inside], stored[0][inside]
