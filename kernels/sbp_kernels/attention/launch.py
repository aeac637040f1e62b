"""Launchers of the attention kernels: their grids, tile shapes, warps and pipeline stages."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sbp_kernels.attention import triton as kernels

Options = dict[str, Any]


def shapes(head_width: int, dtype: torch.dtype) -> Options:
    """Compile-time constants that every kernel shares; float32 is multiplied exactly, for checking."""
    width = triton.next_power_of_2(head_width)
    return {"D": head_width, "WIDTH": max(width, 16), "PRECISION": "ieee" if dtype == torch.float32 else "tf32"}


def forward_options(rows: int, head_width: int, dtype: torch.dtype) -> Options:
    """Warps and pipeline stages of the forward kernel."""
    return _options(8 if rows >= 128 else 4, 3 if rows >= 128 else 2, head_width, dtype)


def dq_options(rows: int, head_width: int, dtype: torch.dtype) -> Options:
    """Warps and pipeline stages of the dQ kernel."""
    return _options(8 if rows >= 128 else 4, 2, head_width, dtype)


def dk_dv_options(rows: int, head_width: int, dtype: torch.dtype) -> Options:
    """Warps and pipeline stages of the dK/dV kernel.

    It has two accumulators of a tile each: four warps hold 64 rows only where heads are no wider than 64.
    """
    return _options(8 if rows >= 128 or head_width > 64 else 4, 2, head_width, dtype)


def _options(warps: int, stages: int, head_width: int, dtype: torch.dtype) -> Options:
    """One stage where heads are wide, so that the tiles fit into shared memory."""
    return {"num_warps": warps, "num_stages": stages if head_width <= 128 and dtype != torch.float32 else 1}


def forward(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, tiles: Tensor, runs: Tensor, scale: float, rows: int, step: int
) -> tuple[Tensor, Tensor]:
    """Compute out [T, Hq, D] and lse [Hq, T], in base 2, over the query tiles of a plan; see `fused` for the arguments."""
    tokens, heads, head_width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    kernels.forward_kernel[(len(tiles) * heads,)](
        q, k, v, out, lse, visible_until, tiles, runs,
        *_strides(q, k, v, out), lse.stride(0), scale,
        HEADS=heads, GROUP=heads // k.shape[1], ROWS=rows, STEP=step,
        **shapes(head_width, q.dtype), **forward_options(rows, head_width, q.dtype),
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visible_until: Tensor,
    tables: tuple[Tensor, ...],
    scale: float,
    tiles: tuple[int, int, int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dQ, dK and dV over the tables of a plan; see `fused` for the arguments."""
    query_tiles, query_runs, key_tiles, key_runs, splits = tables
    query_rows, key_step, key_rows, query_step = tiles
    (_, heads, head_width), key_heads = q.shape, k.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    shared = {"GROUP": heads // key_heads, **shapes(head_width, q.dtype)}
    kernels.dq_kernel[(len(query_tiles) * heads,)](
        q, k, v, out, dout, lse, lse if dlse is None else dlse, dq, delta, visible_until, query_tiles, query_runs,
        *_strides(q, k, v, out, dout, dq), lse.stride(0), 0 if dlse is None else dlse.stride(0), scale,
        HEADS=heads, ROWS=query_rows, STEP=key_step, HAS_DLSE=dlse is not None,
        **shared, **dq_options(query_rows, head_width, q.dtype),
    )  # fmt: skip
    parts = torch.empty(len(splits), key_heads, 2, key_rows, head_width, dtype=torch.float32, device=q.device)
    kernels.dk_dv_kernel[(len(key_tiles) * key_heads,)](
        q, k, v, dout, lse, delta, dk, dv, parts, visible_until, key_tiles, key_runs,
        *_strides(q, k, v, dout, dk, dv), lse.stride(0), *parts.stride()[:2], scale,
        HEADS=key_heads, ROWS=key_rows, STEP=query_step, MAY_SPLIT=len(splits) > 0,
        **shared, **dk_dv_options(key_rows, head_width, q.dtype),
    )  # fmt: skip
    if len(splits):
        kernels.combine_kernel[(len(splits) * key_heads,)](
            parts, dk, dv, splits, *_strides(dk, dv), *parts.stride()[:2],
            HEADS=key_heads, D=head_width, WIDTH=shared["WIDTH"], ROWS=key_rows, num_warps=8 if key_rows >= 128 else 4,
        )  # fmt: skip
    return dq, dk, dv


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of a row and of a head, of each tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]
