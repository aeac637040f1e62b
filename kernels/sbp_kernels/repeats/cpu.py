"""`repeats` on the CPU, by numba."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

LONGEST_SUFFIX = (1 << 15) - 1


@njit(cache=True, nogil=True)
def repeats_by_rows(
    suffix_lengths: NDArray[np.int16], tokens: NDArray[np.int32], lengths: NDArray[np.int32], width: int
) -> NDArray[np.bool_]:
    """Whether each row repeats itself, bool [B]; see `api.repeats` for the arguments."""
    repeated = np.zeros(len(lengths), np.bool_)
    for row in range(len(lengths)):
        newest = lengths[row] - 1
        if newest == 0:
            suffix_lengths[row] = 0
        if newest > 0:  # lags beyond are 0 already
            repeated[row] = (
                _extend(suffix_lengths[row, 1 : newest + 1], tokens[row, :newest][::-1], tokens[row, newest]) >= width
            )
    return repeated


@njit(cache=True, nogil=True)
def _extend(suffix_lengths: NDArray[np.int16], earlier: NDArray[np.int32], newest: np.int32) -> np.int16:
    """Update the suffix lengths of one row: one more where the token of the lag is `newest`, else 0. Return the largest."""
    longest = np.int16(0)
    for lag in range(len(suffix_lengths)):
        length = np.int16(min(suffix_lengths[lag], np.int16(LONGEST_SUFFIX - 1)) + np.int16(1))
        suffix_lengths[lag] = length if earlier[lag] == newest else np.int16(0)
        longest = max(longest, suffix_lengths[lag])
    return longest
