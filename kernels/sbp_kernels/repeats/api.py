"""`repeats`: whether a text repeats itself while it is generated, at the cost of one pass over it for each new token.

The newest `width` tokens occurred before, ending `lag` tokens earlier, if and only if the longest common suffix of the text
and the text without its last `lag` tokens is `width` long or longer. That suffix grows by one where the newest token equals
the one `lag` before it, and has length 0 where it does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sbp_kernels._backends import check_device
from sbp_kernels._registration import register_operation

LONGEST_SUFFIX = (1 << 15) - 1  # what int16 holds


def repeats(suffix_lengths: Tensor, tokens: Tensor, lengths: Tensor, width: int, *, backend: str = "auto") -> Tensor:
    """Whether each row's newest `width` tokens stand in the row before, overlapping them or not.

    To be called once after each token of a row, from its first one on, with the `suffix_lengths` of the call before.

    Args:
        suffix_lengths: int16 [B, T], state, updated in place: [b, lag] is the length of the longest common suffix of row b and
            row b without its last `lag` tokens, at most 32,767; 0 for lags that the row is too short for. A row of one token is
            begun anew, whatever its state.
        tokens: int32 [B, T] tokens, row b's first lengths[b].
        lengths: int32 [B], the newest included; a row of length 0 is idle: its state stays, and it repeats nothing.
        width: from 1 to 32,767.
        backend: "triton", for CUDA tensors (and for any where TRITON_INTERPRET=1 is set, which is slow and for checking);
            "numba", for the CPU; "torch", for every device; or "auto", the first of these that can run.

    Returns:
        bool [B].

    Raises:
        ValueError: naming the argument that does not fit, or a backend that is unknown or cannot run here.
    """
    _check(suffix_lengths, tokens, lengths, width)
    return BACKENDS[_resolved(backend, suffix_lengths)](suffix_lengths, tokens, lengths, width)


def _plain(suffix_lengths: Tensor, tokens: Tensor, lengths: Tensor, width: int) -> Tensor:
    lags = torch.arange(suffix_lengths.shape[1], device=suffix_lengths.device)
    newest = lengths.long().unsqueeze(1) - 1
    indices = newest - lags
    within = (indices >= 0) & (lags > 0)
    equal = tokens.gather(1, indices.clamp(min=0)) == tokens.gather(1, newest.clamp(min=0))
    grown = (suffix_lengths.int() + 1).clamp(max=LONGEST_SUFFIX).where(equal & within & (newest > 0), 0).to(torch.int16)
    suffix_lengths.copy_(grown.where(newest >= 0, suffix_lengths))
    return ((grown >= width) & (newest >= 0)).any(1)


def _compiled(suffix_lengths: Tensor, tokens: Tensor, lengths: Tensor, width: int) -> Tensor:
    from sbp_kernels.repeats.cpu import repeats_by_rows

    return torch.from_numpy(repeats_by_rows(suffix_lengths.numpy(), tokens.numpy(), lengths.numpy(), width))


def _fused(suffix_lengths: Tensor, tokens: Tensor, lengths: Tensor, width: int) -> Tensor:
    return torch.ops.sbp_kernels.repeats(suffix_lengths, tokens, lengths, width)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "triton": _fused,
    "numba": _compiled,
    "torch": _plain,
}


def _resolved(backend: str, suffix_lengths: Tensor) -> str:
    on_cpu = suffix_lengths.device.type == "cpu"
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is unknown: use one of auto, {', '.join(BACKENDS)}")
    if backend == "numba" and not on_cpu:
        raise ValueError(f"backend 'numba' takes tensors on the CPU, not on {suffix_lengths.device}: use backend='torch'")
    if backend == "auto":
        return "triton" if suffix_lengths.is_cuda else "numba" if on_cpu else "torch"
    if backend == "triton":
        check_device(suffix_lengths)
    return backend


def _check(suffix_lengths: Tensor, tokens: Tensor, lengths: Tensor, width: int) -> None:
    if suffix_lengths.dim() != 2 or suffix_lengths.dtype != torch.int16:
        raise ValueError(f"suffix_lengths must be int16 [B, T]: got {suffix_lengths.dtype} {tuple(suffix_lengths.shape)}")
    if suffix_lengths.stride(1) != 1 or tokens.stride(-1) != 1:
        raise ValueError("a row of suffix_lengths and of tokens must be side by side in memory: make them contiguous")
    for name, x, shape in (("tokens", tokens, suffix_lengths.shape), ("lengths", lengths, suffix_lengths.shape[:1])):
        if x.shape != shape or x.dtype != torch.int32 or x.device != suffix_lengths.device:
            given = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name} must be int32 {list(shape)} on {suffix_lengths.device}: got {given}")
    if not 1 <= width <= LONGEST_SUFFIX:
        raise ValueError(f"width must be from 1 to {LONGEST_SUFFIX}: got {width}")


def _fake(suffix_lengths: Tensor, *_: object) -> Tensor:
    return suffix_lengths.new_empty(suffix_lengths.shape[:1], dtype=torch.bool)


register_operation(
    "repeats(Tensor(a!) suffix_lengths, Tensor tokens, Tensor lengths, int width) -> Tensor", "repeats.triton.repeats", _fake
)
