"""Triton kernels of decode attention: partial softmaxes over splits of the pages, their merge, and the append to the pages.

Split-KV decoding (Dao et al. 2023, "Flash-Decoding") in which the tile of queries that meets a split of a seed holds all
samples of that seed, as in cascade inference (Ye et al. 2024) and Hydragen (Juravsky et al. 2024). A split is always the same
number of tokens and sums have one order, so that a row's result does not depend on what else is in the batch. Softmax is
online, in base 2. A part is kept as it is summed up, with its largest score and its normaliser: a log-sum-exp in their place
would err by its own rounding.

Grids follow from the capacities of the layout alone; programs without work end at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_FLOAT8 = tl.constexpr(448.0)
SPLIT_TOKENS = 512  # of a part, a multiple of every page; a constant, for a row's sums must not depend on the batch
WIDEST_TILE = 64  # rows of queries; more of a group's take several programs
AMD = torch.version.hip is not None


@triton.jit
def load_tokens(
    cache, pages, first, stop, page_stride, token_stride,
    PAGE: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The tokens `first` on of one head as [STEP, WIDTH]; zeros past column D and, where MASKED, from `stop` on."""
    token = first + tl.arange(0, STEP)
    column = tl.arange(0, WIDTH)[None, :]
    if STEP <= PAGE:
        page = tl.load(pages + first // PAGE).to(tl.int64)
        pointer = cache + page * page_stride + (token % PAGE)[:, None] * token_stride + column
    else:
        page = tl.load(pages + token // PAGE, mask=token < stop, other=0).to(tl.int64)
        pointer = cache + page[:, None] * page_stride + (token % PAGE)[:, None] * token_stride + column
    if MASKED:
        tile = tl.load(pointer, mask=(token < stop)[:, None] & (column < D), other=0.0)
    elif D < WIDTH:
        tile = tl.load(pointer, mask=column < D, other=0.0)
    else:
        tile = tl.load(pointer)
    return tile


@triton.jit
def attend(
    total, largest, normalizer, q_tile, keys, values, pages, first, stop, k_page, k_token, v_page, v_token, scale,
    PAGE: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take STEP tokens into the online softmax of the tile's queries; `scale` includes log2(e)."""
    k_tile = load_tokens(keys, pages, first, stop, k_page, k_token, PAGE, STEP, D, WIDTH, MASKED).to(q_tile.dtype)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
    if MASKED:
        scores = tl.where((first + tl.arange(0, STEP) < stop)[None, :], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    normalizer = normalizer * shrink + tl.sum(weights, 1)
    v_tile = load_tokens(values, pages, first, stop, v_page, v_token, PAGE, STEP, D, WIDTH, MASKED).to(q_tile.dtype)
    total = tl.dot(weights.to(v_tile.dtype), v_tile, total * shrink[:, None], input_precision=PRECISION)
    return total, new_largest, normalizer


@triton.jit(do_not_specialize=["splits", "first_split", "all_splits", "samples"])
def partial_kernel(
    q, keys, values, parts, statistics, rows, pages, tokens,
    q_row, q_head, k_page, k_head, k_token, v_page, v_head, v_token, rows_stride, pages_stride,
    splits, first_split, all_splits, samples, scale,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part, not normalised, of up to ROWS queries that share one split of tokens and one key head.

    Where SHARED, sequence i is the seed of group i and its queries are those of the rows [samples] in the table `rows`, else
    it is row i's own tokens. Parts are [B, H, all_splits, D], those of these sequences from `first_split` on; statistics are
    [B, H, all_splits, 2], the largest score and the normaliser.
    """
    blocks = tl.cdiv(samples * GROUP, ROWS)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % KEY_HEADS
    split = tl.program_id(0) // (blocks * KEY_HEADS) % splits
    sequence = tl.cast(tl.program_id(0) // (blocks * KEY_HEADS * splits), tl.int64)
    start, count = split * SPLIT, tl.load(tokens + sequence)
    if start >= count:
        return
    member = block * ROWS + tl.arange(0, ROWS)
    sample = member // GROUP
    if SHARED:
        row = tl.load(rows + sequence * rows_stride + sample, mask=sample < samples, other=-1).to(tl.int64)
    else:
        row = tl.where(sample < samples, sequence, -1)
    if tl.max(row) < 0:
        return
    head = tl.cast(head, tl.int64)
    query_head = head * GROUP + member % GROUP
    column = tl.arange(0, WIDTH)[None, :]
    live = (row >= 0)[:, None] & (column < D)
    q_tile = tl.load(q + (row * q_row + query_head * q_head)[:, None] + column, mask=live, other=0.0)
    keys += head * k_head
    values += head * v_head
    pages += sequence * pages_stride
    scale *= LOG2_E
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)  # a split holds a token at least
    normalizer = tl.zeros([ROWS], tl.float32)
    stop = tl.minimum(start + SPLIT, count)
    whole = start + (stop - start) // STEP * STEP
    for first in tl.range(start, whole, STEP):
        total, largest, normalizer = attend(
            total, largest, normalizer, q_tile, keys, values, pages, first, stop, k_page, k_token, v_page, v_token, scale,
            PAGE, STEP, D, WIDTH, False, PRECISION,
        )  # fmt: skip
    if whole < stop:
        total, largest, normalizer = attend(
            total, largest, normalizer, q_tile, keys, values, pages, whole, stop, k_page, k_token, v_page, v_token, scale,
            PAGE, STEP, D, WIDTH, True, PRECISION,
        )  # fmt: skip
    part = (row * (KEY_HEADS * GROUP) + query_head) * all_splits + first_split + split
    tl.store(parts + part[:, None] * D + column, total, mask=live)
    tl.store(statistics + part * 2, largest, mask=row >= 0)
    tl.store(statistics + part * 2 + 1, normalizer, mask=row >= 0)


@triton.jit(do_not_specialize=["seed_splits", "all_splits"])
def merge_kernel(
    parts, statistics, out, seed_tokens, row_group, own_tokens, out_row, out_head, seed_splits, all_splits,
    HEADS: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out of one row and head: the parts of its seed, then its own, in their order; zeros where the row is idle."""
    row, head = tl.cast(tl.program_id(0) // HEADS, tl.int64), tl.program_id(0) % HEADS
    own = tl.load(own_tokens + row)
    group = tl.load(row_group + row)
    of_seed = tl.cdiv(tl.load(seed_tokens + group, mask=own > 0, other=0), SPLIT)
    column = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    largest = tl.full([1], float("-inf"), tl.float32)
    normalizer = tl.zeros([1], tl.float32)
    for number in range(of_seed + tl.cdiv(own, SPLIT)):
        split = tl.where(number < of_seed, number, seed_splits + number - of_seed)
        part = (row * HEADS + head) * all_splits + split
        part_largest = tl.load(statistics + part * 2)
        new_largest = tl.maximum(largest, part_largest)
        shrink, weight = tl.exp2(largest - new_largest), tl.exp2(part_largest - new_largest)
        normalizer = normalizer * shrink + tl.load(statistics + part * 2 + 1) * weight
        total = total * shrink + tl.load(parts + part * D + column, mask=column < D, other=0.0) * weight
        largest = new_largest
    result = total / tl.where(own > 0, normalizer, 1.0)
    tl.store(out + row * out_row + head * out_head + column, result.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def append_kernel(
    k, v, keys, values, own_pages, own_tokens,
    k_row, k_head, v_row, v_head, keys_page, keys_head, keys_token, values_page, values_head, values_token, pages_stride,
    KEY_HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write one row's key and value of all heads where its newest token lies, an idle row's into page 0."""
    row = tl.cast(tl.program_id(0), tl.int64)
    count = tl.load(own_tokens + row)
    newest = tl.maximum(count - 1, 0)
    page = tl.load(own_pages + row * pages_stride + newest // PAGE, mask=count > 0, other=0).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    present = (head < KEY_HEADS) & (column < D)
    key = tl.load(k + row * k_row + head * k_head + column, mask=present, other=0.0)
    value = tl.load(v + row * v_row + head * v_head + column, mask=present, other=0.0)
    key_pointer = keys + page * keys_page + head * keys_head + newest % PAGE * keys_token + column
    value_pointer = values + page * values_page + head * values_head + newest % PAGE * values_token + column
    tl.store(key_pointer, converted(key, keys.dtype.element_ty), mask=present)
    tl.store(value_pointer, converted(value, values.dtype.element_ty), mask=present)


@triton.jit
def converted(x, dtype: tl.constexpr):
    """x in the dtype of the cache; what is beyond the range of float8 becomes its largest."""
    if dtype == tl.float8e4nv:
        x = x.to(tl.float32)
        x = tl.where(x > LARGEST_FLOAT8, LARGEST_FLOAT8, tl.where(x < -LARGEST_FLOAT8, -LARGEST_FLOAT8, x))
    return x.to(dtype)


def attention(
    q: Tensor, keys: Tensor, values: Tensor, seed_pages: Tensor, seed_tokens: Tensor, group_rows: Tensor, row_group: Tensor,
    own_pages: Tensor, own_tokens: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """Compute out [B, H, D]; see `api.decode_attention` and `layout.DecodeLayout` for the arguments."""
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
    merge_kernel[(rows * heads,)](
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
    partial_kernel[grid](
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
    append_kernel[(len(k),)](
        k, v, keys, values, own_pages, own_tokens,
        *k.stride()[:2], *v.stride()[:2], *keys.stride()[:3], *values.stride()[:3], own_pages.stride(0),
        KEY_HEADS=key_heads, BLOCK_HEADS=triton.next_power_of_2(key_heads), PAGE=page, **_widths(head_width),
        num_warps=4,
    )  # fmt: skip


def _widths(head_width: int) -> dict[str, int]:
    return {"D": head_width, "WIDTH": max(triton.next_power_of_2(head_width), 16)}
