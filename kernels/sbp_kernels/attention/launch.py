"""Launchers of the attention kernels; `_tuned` says in which configuration."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sbp_kernels._tuned import Configuration, Launch
from sbp_kernels.attention import triton as kernels

Options = dict[str, Any]


def shapes(head_width: int, dtype: torch.dtype) -> Options:
    """Compile-time constants that every kernel shares; float32 is multiplied exactly, for checking."""
    width = triton.next_power_of_2(head_width)
    return {"D": head_width, "WIDTH": max(width, 16), "PRECISION": "ieee" if dtype == torch.float32 else "tf32"}


def _options(launch: Launch) -> Options:
    return {"STEP": launch.step, "num_warps": launch.warps, "num_stages": launch.stages}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible_until: Tensor,
    tiles: Tensor,
    runs: Tensor,
    scale: float,
    configuration: Configuration,
) -> tuple[Tensor, Tensor]:
    """Compute out [T, Hq, D] and lse [Hq, T], in base 2, over the query tiles of a plan; see `fused` for the arguments."""
    tokens, heads, head_width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    kernels.forward_kernel[(len(tiles) * heads,)](
        q, k, v, out, lse, visible_until, tiles, runs,
        *_strides(q, k, v, out), lse.stride(0), scale,
        HEADS=heads, GROUP=heads // k.shape[1], ROWS=configuration.query_rows,
        **shapes(head_width, q.dtype), **_options(configuration.forward),
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
    configuration: Configuration,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dQ, dK and dV over the tables of a plan; see `fused` for the arguments."""
    query_tiles, query_runs, key_tiles, key_runs, splits = tables
    dq, delta = query_gradient(dout, dlse, q, k, v, out, lse, visible_until, query_tiles, query_runs, scale, configuration)
    dk, dv = key_gradients(dout, q, k, v, lse, delta, visible_until, key_tiles, key_runs, splits, scale, configuration)
    return dq, dk, dv


def query_gradient(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visible_until: Tensor,
    tiles: Tensor,
    runs: Tensor,
    scale: float,
    configuration: Configuration,
) -> tuple[Tensor, Tensor]:
    """Compute dQ [T, Hq, D], and delta [Hq, T] for `key_gradients`."""
    (_, heads, head_width), key_heads = q.shape, k.shape[1]
    dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    kernels.dq_kernel[(len(tiles) * heads,)](
        q, k, v, out, dout, lse, lse if dlse is None else dlse, dq, delta, visible_until, tiles, runs,
        *_strides(q, k, v, out, dout, dq), lse.stride(0), 0 if dlse is None else dlse.stride(0), scale,
        HEADS=heads, GROUP=heads // key_heads, ROWS=configuration.query_rows, HAS_DLSE=dlse is not None,
        **shapes(head_width, q.dtype), **_options(configuration.dq),
    )  # fmt: skip
    return dq, delta


def key_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    visible_until: Tensor,
    tiles: Tensor,
    runs: Tensor,
    splits: Tensor,
    scale: float,
    configuration: Configuration,
) -> tuple[Tensor, Tensor]:
    """Compute dK and dV [T, Hkv, D]."""
    (_, heads, head_width), key_heads, key_rows = q.shape, k.shape[1], configuration.key_rows
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    shared = shapes(head_width, q.dtype)
    parts = torch.empty(len(splits), key_heads, 2, key_rows, head_width, dtype=torch.float32, device=q.device)
    kernels.dk_dv_kernel[(len(tiles) * key_heads,)](
        q, k, v, dout, lse, delta, dk, dv, parts, visible_until, tiles, runs,
        *_strides(q, k, v, dout, dk, dv), lse.stride(0), *parts.stride()[:2], scale,
        HEADS=key_heads, GROUP=heads // key_heads, ROWS=key_rows, MAY_SPLIT=len(splits) > 0,
        **shared, **_options(configuration.dk_dv),
    )  # fmt: skip
    if len(splits):
        kernels.combine_kernel[(len(splits) * key_heads,)](
            parts, dk, dv, splits, *_strides(dk, dv), *parts.stride()[:2],
            HEADS=key_heads, D=head_width, WIDTH=shared["WIDTH"], ROWS=key_rows, num_warps=8 if key_rows >= 128 else 4,
        )  # fmt: skip
    return dk, dv


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of a row and of a head, of each tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]
