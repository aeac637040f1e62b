"""Sorted rows on disk, for more rows than memory holds: written by one task of `pair`, read by ranges in the next.

A file is a structured numpy array, sorted by one of its fields.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sbp_fast.pipeline.files import save_array


def write_rows(path: Path, dtype: np.dtype, order: np.ndarray | None = None, **columns: np.ndarray) -> None:
    """Write rows of `dtype` atomically, each field from the column of its name, all columns of one shape.

    With an `order`, int64 [rows], the rows are written in it; one column is put in order at a time, for the sake of memory.
    """
    rows = np.empty(next(iter(columns.values())).shape, dtype)
    for name in dtype.names or ():
        rows[name] = columns[name] if order is None else columns[name][order]
    save_array(path, rows)


def read_between(path: Path, field: str, low: int, high: int) -> np.ndarray:
    """Read the rows of a file sorted by `field` whose value is in [low, high), and no others."""
    rows = np.load(path, mmap_mode="r")
    start = bisect_left(rows[field], low)
    return np.array(rows[start : bisect_left(rows[field], high, start)])


def read_all_between(paths: Iterable[Path], dtype: np.dtype, field: str, low: int, high: int) -> np.ndarray:
    """Read the rows of several files whose `field` is in [low, high), concatenated."""
    return np.concatenate([np.zeros(0, dtype), *(read_between(path, field, low, high) for path in paths)])
