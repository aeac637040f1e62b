"""How the kernels of decode attention are launched: their grids, tile shapes, warps and pipeline stages.

Grids follow from the capacities of the layout alone; programs without work end at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sbp_kernels.decode import kernels

SPLIT_TOKENS = 512  # of a part, a multiple of every page; a constant, for a row's sums must not depend on the batch
WIDEST_TILE = 64  # rows of queries; more of a group's take several programs
AMD = torch.version.hip is not None


def attention(
    q: Tensor, keys: Tensor, values: Tensor, seed_pages: Tensor, seed_tokens: Tensor, group_rows: Tensor, row_group: Tensor,
    own_pages: Tensor, own_tokens: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """out [B, H, D]; see `attention.decode_attention` and `layout.DecodeLayout` for the arguments."""
    rows, heads, head_width = q.shape
    q = q if q.stride(2) == 1 else q.contiguous()
    seed_splits, own_splits = (triton.cdiv(pages.shape[1] * keys.shape[2], SPLIT_TOKENS) for pages in (seed_pages, own_pages))
    parts, statistics = (
        torch.empty(rows, heads, seed_splits + own_splits, width, dtype=torch.float32, device=q.device)
        for width in (head_width, 2)
    )
    caches = (q, keys, values, parts, statistics)
    members = group_rows.shape[1]
    _partial(caches, group_rows, seed_pages, seed_tokens, scale, members, splits=seed_splits, first_split=0)
    _partial(caches, None, own_pages, own_tokens, scale, 1, splits=own_splits, first_split=seed_splits)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kernels.merge_kernel[(rows * heads,)](
        parts, statistics, out, seed_tokens, row_group, own_tokens, out.stride(0), out.stride(1),
        seed_splits, seed_splits + own_splits, HEADS=heads, SPLIT=SPLIT_TOKENS, **_widths(head_width), num_warps=1,
    )  # fmt: skip
    return out


def _partial(
    tensors: tuple[Tensor, ...], rows: Tensor | None, pages: Tensor, tokens: Tensor, scale: float, samples: int,
    *, splits: int, first_split: int,
) -> None:  # fmt: skip
    """The parts of all sequences, [sequences, any] `pages` and [sequences] `tokens`: seeds where there are `rows`, or own."""
    q, keys, values, parts, statistics = tensors
    key_heads, page, head_width = keys.shape[1:]
    group = q.shape[1] // key_heads
    options = partial_options(samples * group, head_width, q.dtype)
    grid = (len(tokens) * splits * key_heads * triton.cdiv(samples * group, options["ROWS"]),)
    table = pages if rows is None else rows
    kernels.partial_kernel[grid](
        q, keys, values, parts, statistics, table, pages, tokens,
        *q.stride()[:2], *keys.stride()[:3], *values.stride()[:3], table.stride(0), pages.stride(0),
        splits, first_split, parts.shape[2], samples, scale,
        KEY_HEADS=key_heads, GROUP=group, SHARED=rows is not None, PAGE=page, SPLIT=SPLIT_TOKENS,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **_widths(head_width), **options,
    )  # fmt: skip


def partial_options(queries: int, head_width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile shape and launch options by the number of queries that share keys; float32 is for checking.

    Of five pipeline stages the page's id takes two, so that there are two buffers for keys and values; what shared memory
    an AMD multiprocessor has is filled by one.
    """
    step = 16 if dtype == torch.float32 else 64 if head_width <= 128 else 32
    return {
        "ROWS": min(max(triton.next_power_of_2(queries), 16), WIDEST_TILE),
        "STEP": step,
        "num_warps": 4,
        "num_stages": 1 if dtype == torch.float32 else 2 if AMD else 5,
    }


def append(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, own_pages: Tensor, own_tokens: Tensor) -> None:
    """Write each row's newest key and value into its page."""
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    key_heads, page, head_width = keys.shape[1:]
    kernels.append_kernel[(len(k),)](
        k, v, keys, values, own_pages, own_tokens,
        *k.stride()[:2], *v.stride()[:2], *keys.stride()[:3], *values.stride()[:3], own_pages.stride(0),
        KEY_HEADS=key_heads, BLOCK_HEADS=triton.next_power_of_2(key_heads), PAGE=page, **_widths(head_width),
        num_warps=4,
    )  # fmt: skip


def _widths(head_width: int) -> dict[str, int]:
    return {"D": head_width, "WIDTH": max(triton.next_power_of_2(head_width), 16)}
