"""`repeats`: whether a text that is being drawn repeats itself, at the cost of one pass over it for each new token.

Texts begin in common as far as their suffixes say: the newest `width` tokens occurred before, ending `lag` tokens earlier, if
and only if the longest common suffix of the text and the text without its last `lag` tokens is `width` long or longer. That
suffix grows by one where the newest token equals the one `lag` before it, and is gone where it does not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from sbp_kernels._backends import check_device
from sbp_kernels._registration import register_operation

LONGEST_RUN = (1 << 15) - 1


def repeats(runs: Tensor, drawn: Tensor, lengths: Tensor, width: int, *, backend: str = "auto") -> Tensor:
    """Whether each row's newest `width` tokens stand in the row before, overlapping them or not.

    To be called once after each token of a row, from its first one on, with the `runs` of the call before.

    Args:
        runs: int16 [B, T], state, updated in place: runs[b, lag] is the length of the longest common suffix of row b and row b
            without its last `lag` tokens, at most 32,767; 0 for lags that the row is too short for. A row of one token is
            begun anew, whatever its state.
        drawn: int32 [B, T] tokens, row b's first lengths[b].
        lengths: int32 [B], the newest included; a row of length 0 is idle: its state stays, and it repeats nothing.
        width: from 1 to 32,767.
        backend: "triton", for CUDA tensors (and for any where TRITON_INTERPRET=1 is set, which is slow and for checking);
            "numba", for the CPU; "torch", for every device; or "auto", the first of these that can run.

    Returns:
        bool [B].

    Raises:
        ValueError: naming the argument that does not fit, or a backend that is unknown or cannot run here.
    """
    _check(runs, drawn, lengths, width)
    return BACKENDS[_resolved(backend, runs)](runs, drawn, lengths, width)


def _plain(runs: Tensor, drawn: Tensor, lengths: Tensor, width: int) -> Tensor:
    lags = torch.arange(runs.shape[1], device=runs.device)
    newest = lengths.long().unsqueeze(1) - 1
    places = newest - lags
    within = (places >= 0) & (lags > 0)
    equal = drawn.gather(1, places.clamp(min=0)) == drawn.gather(1, newest.clamp(min=0))
    grown = (runs.int() + 1).clamp(max=LONGEST_RUN).where(equal & within & (newest > 0), 0).to(torch.int16)
    runs.copy_(grown.where(newest >= 0, runs))
    return ((grown >= width) & (newest >= 0)).any(1)


def _compiled(runs: Tensor, drawn: Tensor, lengths: Tensor, width: int) -> Tensor:
    return torch.from_numpy(_by_rows(runs.numpy(), drawn.numpy(), lengths.numpy(), width))


@njit(cache=True, nogil=True)
def _by_rows(runs: NDArray[np.int16], drawn: NDArray[np.int32], lengths: NDArray[np.int32], width: int) -> NDArray[np.bool_]:
    found = np.zeros(len(lengths), np.bool_)
    for row in range(len(lengths)):
        newest = lengths[row] - 1
        if newest == 0:
            runs[row] = 0
        if newest > 0:  # lags beyond are 0 already
            found[row] = _extend(runs[row, 1 : newest + 1], drawn[row, :newest][::-1], drawn[row, newest]) >= width
    return found


@njit(cache=True, nogil=True)
def _extend(runs: NDArray[np.int16], earlier: NDArray[np.int32], newest: np.int32) -> np.int16:
    """The longest of the runs, each one longer where the token of its lag is `newest`, else 0."""
    longest = np.int16(0)
    for place in range(len(runs)):
        run = np.int16(min(runs[place], np.int16(LONGEST_RUN - 1)) + np.int16(1))
        runs[place] = run if earlier[place] == newest else np.int16(0)
        longest = max(longest, runs[place])
    return longest


def _fused(runs: Tensor, drawn: Tensor, lengths: Tensor, width: int) -> Tensor:
    return torch.ops.sbp_kernels.repeats(runs, drawn, lengths, width)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "triton": _fused,
    "numba": _compiled,
    "torch": _plain,
}


def _resolved(backend: str, runs: Tensor) -> str:
    on_cpu = runs.device.type == "cpu"
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is unknown: use one of auto, {', '.join(BACKENDS)}")
    if backend == "numba" and not on_cpu:
        raise ValueError(f"backend 'numba' takes tensors on the CPU, not on {runs.device}: use backend='torch'")
    if backend == "auto":
        return "triton" if runs.is_cuda else "numba" if on_cpu else "torch"
    if backend == "triton":
        check_device(runs)
    return backend


def _check(runs: Tensor, drawn: Tensor, lengths: Tensor, width: int) -> None:
    if runs.dim() != 2 or runs.dtype != torch.int16:
        raise ValueError(f"runs must be int16 [B, T]: got {runs.dtype} {tuple(runs.shape)}")
    if runs.stride(1) != 1 or drawn.stride(-1) != 1:
        raise ValueError("the tokens of a row of runs and drawn must be side by side in memory: make them contiguous")
    for name, x, shape in (("drawn", drawn, runs.shape), ("lengths", lengths, runs.shape[:1])):
        if x.shape != shape or x.dtype != torch.int32 or x.device != runs.device:
            found = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name} must be int32 {list(shape)} on {runs.device}: got {found}")
    if not 1 <= width <= LONGEST_RUN:
        raise ValueError(f"width must be from 1 to {LONGEST_RUN}: got {width}")


def _fake(runs: Tensor, *_: object) -> Tensor:
    return runs.new_empty(runs.shape[:1], dtype=torch.bool)


register_operation(
    "repeats(Tensor(a!) runs, Tensor drawn, Tensor lengths, int width) -> Tensor", "repeats.triton.repeats", _fake
)
