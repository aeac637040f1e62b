"""The fused attention as operations of PyTorch: `torch.ops.sbp_kernels.packed_attention` and its backward.

Their arguments are tensors of fixed shapes and a few constants, so that nothing is recompiled when lengths change. Triton
is imported when one of them first runs. Their log-sum-exp is in base 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sbp_kernels import _tuned
from sbp_kernels._backends import interprets
from sbp_kernels._tuned import Configuration
from sbp_kernels.attention.operations import Gradients, register_attention
from sbp_kernels.attention.registry import register_attention_backend
from sbp_kernels.layout import PackedLayout

TABLES = "Tensor query_tiles, Tensor query_runs, Tensor key_tiles, Tensor key_runs, Tensor splits"


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute out [T, Hq, D] by the Triton kernels, and lse [Hq, T] if it is wanted; differentiable."""
    _check_heads(q, "triton")
    out, lse = torch.ops.sbp_kernels.packed_attention(q, k, v, *_arguments(layout, scale))
    return out, lse * math.log(2) if return_lse else None


def specialised_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the same as `fused_attention`, with the forward kernel for Hopper; see `hopper`."""
    _check_heads(q, "triton-hopper")
    out, lse = torch.ops.sbp_kernels.specialised_attention(q, k, v, *_arguments(layout, scale))
    return out, lse * math.log(2) if return_lse else None


def _arguments(layout: PackedLayout, scale: float) -> tuple[Any, ...]:
    plan = layout.planned().plan
    assert plan is not None
    sizes = plan.tiles
    tiles = [sizes.query_rows, sizes.key_step, sizes.key_rows, sizes.query_step]
    return (layout.visible_until, *plan.tables, scale, tiles)


def _forward(q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from sbp_kernels.attention import launch

    query_tiles, query_runs, _, _, _, scale, tiles = rest
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    return launch.forward(q, k, v, visible_until, query_tiles, query_runs, scale, _configuration(q, tiles))


def _specialised_forward(q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from sbp_kernels.attention import hopper

    query_tiles, query_runs, _, _, _, scale, tiles = rest
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    return hopper.specialised_forward(q, k, v, visible_until, query_tiles, query_runs, scale, tiles[0], tiles[1])


def _backward(dout: Tensor, dlse: Tensor | None, *rest: Any) -> Gradients:
    from sbp_kernels.attention import launch

    q, k, v, out, lse, visible_until, *tables, scale, tiles = rest
    dout, q, k, v = (_rows_contiguous(x) for x in (dout, q, k, v))
    dlse = dlse if dlse is None else _rows_contiguous(dlse)
    return launch.backward(dout, dlse, q, k, v, out, lse, visible_until, tuple(tables), scale, _configuration(q, tiles))


def _configuration(q: Tensor, tiles: Sequence[int]) -> Configuration:
    return _tuned.configuration(q.device, q.shape[2], q.dtype, (tiles[0], tiles[1], tiles[2], tiles[3]))


def _check_device(backend: str, device: torch.device) -> None:
    if device.type != "cuda" and not interprets():
        raise ValueError(f"backend {backend!r} needs CUDA tensors, these are on {device.type}: use backend 'torch'")


def _check_heads(q: Tensor, backend: str) -> None:
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q is {q.dtype}: backend {backend!r} takes bfloat16, float16 and float32")
    if not 1 <= q.shape[2] <= 256:
        raise ValueError(f"q has heads of width {q.shape[2]}: backend {backend!r} takes up to 256")
    if backend == "triton-hopper" and q.shape[2] not in (16, 32, 64, 128):
        raise ValueError(f"q has heads of width {q.shape[2]}: backend 'triton-hopper' takes 16, 32, 64 and 128")


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


ARGUMENTS = f"Tensor visible_until, {TABLES}, float scale, int[] tiles"
register_attention("packed_attention", ARGUMENTS, _forward, _backward)
register_attention("specialised_attention", ARGUMENTS, _specialised_forward, _backward)
register_attention_backend(
    "triton",
    fused_attention,
    operations=["sbp_kernels::packed_attention"],
    check_device=partial(_check_device, "triton"),
)
register_attention_backend(
    "triton-hopper",
    specialised_attention,
    operations=["sbp_kernels::specialised_attention"],
    check_device=partial(_check_device, "triton-hopper"),
)
