"""The fused attention as operations of PyTorch: `torch.ops.sbp_kernels.packed_attention` and its backward.

Their arguments are tensors of fixed shapes and a few constants, so that nothing is recompiled when lengths change. Triton
is imported when one of them first runs. Their log-sum-exp is in base 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sbp_kernels.attention.registration import Gradients, register
from sbp_kernels.layout import PackedLayout

TABLES = "Tensor query_tiles, Tensor query_runs, Tensor key_tiles, Tensor key_runs, Tensor splits"


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out [T, Hq, D] by the Triton kernels, and lse [Hq, T] if it is wanted; differentiable."""
    out, lse = torch.ops.sbp_kernels.packed_attention(q, k, v, *_arguments(layout, scale))
    return out, lse * math.log(2) if return_lse else None


def specialised_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The same with the forward kernel for Hopper; see `hopper_kernels`."""
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
    return launch.forward(q, k, v, visible_until, query_tiles, query_runs, scale, tiles[0], tiles[1])


def _specialised_forward(q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from sbp_kernels.attention import hopper_kernels

    query_tiles, query_runs, _, _, _, scale, tiles = rest
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    return hopper_kernels.specialised_forward(q, k, v, visible_until, query_tiles, query_runs, scale, tiles[0], tiles[1])


def _backward(dout: Tensor, dlse: Tensor | None, *rest: Any) -> Gradients:
    from sbp_kernels.attention import launch

    q, k, v, out, lse, visible_until, *tables, scale, tiles = rest
    dout, q, k, v = (_rows_contiguous(x) for x in (dout, q, k, v))
    dlse = dlse if dlse is None else _rows_contiguous(dlse)
    return launch.backward(dout, dlse, q, k, v, out, lse, visible_until, tuple(tables), scale, tuple(tiles))


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


ARGUMENTS = f"Tensor visible_until, {TABLES}, float scale, int[] tiles"
DEVICES = ("CPU", "CUDA")  # on the CPU Triton's interpreter runs them
register("packed_attention", ARGUMENTS, _forward, _backward, DEVICES)
register("specialised_attention", ARGUMENTS, _specialised_forward, _backward, DEVICES)
