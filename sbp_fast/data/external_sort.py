"""Rows that more memory would be needed for than there is: sorted on disk, and read a run at a time.

The tasks of `pair` hand them on. A file is a structured numpy array, sorted by one of its fields.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sbp_fast.pipeline.files import save_array


def write_rows(path: Path, dtype: np.dtype, **columns: np.ndarray) -> None:
    """Write rows of `dtype`, each field from the column of its name, all of one shape. Atomic."""
    rows = np.empty(next(iter(columns.values())).shape, dtype)
    for name in dtype.names or ():
        rows[name] = columns[name]
    save_array(path, rows)


def read_between(path: Path, field: str, low: int, high: int) -> np.ndarray:
    """The rows of a file sorted by `field` in which it is in [low, high); the others are not read."""
    rows = np.load(path, mmap_mode="r")
    start = bisect_left(rows[field], low)
    return np.array(rows[start : bisect_left(rows[field], high, start)])


def read_all_between(paths: Iterable[Path], dtype: np.dtype, field: str, low: int, high: int) -> np.ndarray:
    """Those of several files, one after the other."""
    return np.concatenate([np.zeros(0, dtype), *(read_between(path, field, low, high) for path in paths)])
