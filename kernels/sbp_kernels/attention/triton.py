"""Attention over a tile plan in Triton: forward, dQ, dK/dV, and the sum of split key tiles.

A program computes one tile of the plan for one head: without a mask over the runs that the tile sees whole, then with it
over the others. Softmax is online (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023, algorithm 1) in base 2, and so is
the log-sum-exp `lse`: converted and back, the weights of the backward would err by its rounding.
Programs are numbered tile by tile and head by head, so that the longest tiles start first and the heads that share keys
run side by side. Nothing is added atomically: every sum has one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sbp_kernels.layout.plan import SPLIT_COLUMNS, TILE_COLUMNS

LOG2_E = tl.constexpr(1.4426950408889634)
TILE = tl.constexpr(TILE_COLUMNS)
SPLIT = tl.constexpr(SPLIT_COLUMNS)


@triton.jit
def load_tile(base, first, stop, stride, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows `first` on of a [T, D] matrix as [ROWS, WIDTH]; zeros past column D and, where BOUNDED, from row `stop` on."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    pointer = base + tl.cast(first, tl.int64) * stride + row * stride + column
    if BOUNDED:
        if D < WIDTH:
            values = tl.load(pointer, mask=(first + row < stop) & (column < D), other=0.0)
        else:
            values = tl.load(pointer, mask=first + row < stop, other=0.0)
    else:
        if D < WIDTH:
            values = tl.load(pointer, mask=column < D, other=0.0)
        else:
            values = tl.load(pointer)
    return values


@triton.jit
def store_tile(base, first, stop, stride, values, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Write rows `first` to `stop` of a [T, D] matrix from [ROWS, WIDTH]."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    pointer = base + tl.cast(first, tl.int64) * stride + row * stride + column
    tl.store(pointer, values.to(base.dtype.element_ty), mask=(first + row < stop) & (column < D))


@triton.jit
def attend(
    total, largest, normalizer, q, k, v, visible_until, row, start, stop, k_row, v_row, scale,
    STEP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the keys [start, stop) into the online softmax of the queries `row`; `scale` includes log2(e)."""
    for first in tl.range(start, stop, STEP):
        k_tile = load_tile(k, first, stop, k_row, STEP, D, WIDTH, MASKED)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        if MASKED:
            key = first + tl.arange(0, STEP)
            until = tl.load(visible_until + key, mask=key < stop, other=0)
            visible = (key[None, :] <= row[:, None]) & (row[:, None] < until[None, :])
            scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        normalizer = normalizer * shrink + tl.sum(weights, 1)
        v_tile = load_tile(v, first, stop, v_row, STEP, D, WIDTH, MASKED)
        total = tl.dot(weights.to(v_tile.dtype), v_tile, total * shrink[:, None], input_precision=PRECISION)
        largest = new_largest
    return total, largest, normalizer


@triton.jit
def forward_kernel(
    q, k, v, out, lse, visible_until, tiles, runs,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, lse_head, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of one query tile and one query head."""
    head = tl.cast(tl.program_id(0) % HEADS, tl.int64)
    tile = tiles + tl.program_id(0) // HEADS * TILE
    start, stop = tl.load(tile), tl.load(tile + 1)
    if start == stop:
        return
    scale *= LOG2_E
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    row = start + tl.arange(0, ROWS)
    q_tile = load_tile(q + head * q_head, start, stop, q_row, ROWS, D, WIDTH, True)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    largest = tl.full([ROWS], -1e38, tl.float32)  # finite, so that a step in which a row sees nothing leaves it as it is
    normalizer = tl.zeros([ROWS], tl.float32)
    first_masked, last = tl.load(tile + 3), tl.load(tile + 4)
    for run in range(tl.load(tile + 2), first_masked):
        total, largest, normalizer = attend(
            total, largest, normalizer, q_tile, k, v, visible_until, row, tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1),
            k_row, v_row, scale, STEP, D, WIDTH, False, PRECISION,
        )  # fmt: skip
    for run in range(first_masked, last):
        total, largest, normalizer = attend(
            total, largest, normalizer, q_tile, k, v, visible_until, row, tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1),
            k_row, v_row, scale, STEP, D, WIDTH, True, PRECISION,
        )  # fmt: skip
    store_tile(out + head * out_head, start, stop, out_row, total / normalizer[:, None], ROWS, D, WIDTH)
    tl.store(lse + head * lse_head + row, largest + tl.log2(normalizer), mask=row < stop)


@triton.jit
def accumulate_dq(
    dq, q, dout, row_lse, delta, k, v, visible_until, row, start, stop, k_row, v_row, scale,
    STEP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the keys [start, stop) give to dQ / scale (FlashAttention-2, algorithm 2)."""
    for first in tl.range(start, stop, STEP):
        k_tile = load_tile(k, first, stop, k_row, STEP, D, WIDTH, MASKED)
        v_tile = load_tile(v, first, stop, v_row, STEP, D, WIDTH, MASKED)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        if MASKED:
            key = first + tl.arange(0, STEP)
            until = tl.load(visible_until + key, mask=key < stop, other=0)
            visible = (key[None, :] <= row[:, None]) & (row[:, None] < until[None, :])
            scores = tl.where(visible, scores, float("-inf"))
        weights = tl.exp2(scores * scale - row_lse[:, None])
        dweights = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q, k, v, out, dout, lse, dlse, dq, delta, visible_until, tiles, runs,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, dout_row, dout_head, dq_row, dq_head, lse_head, dlse_head,
    scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, HAS_DLSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one query tile and one query head, and delta = rowsum(dO * O) - log2(e) dlse, which the dK/dV kernel reads."""
    head = tl.cast(tl.program_id(0) % HEADS, tl.int64)
    tile = tiles + tl.program_id(0) // HEADS * TILE
    start, stop = tl.load(tile), tl.load(tile + 1)
    if start == stop:
        return
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    row = start + tl.arange(0, ROWS)
    dout_tile = load_tile(dout + head * dout_head, start, stop, dout_row, ROWS, D, WIDTH, True)
    out_tile = load_tile(out + head * out_head, start, stop, out_row, ROWS, D, WIDTH, True)
    row_delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if HAS_DLSE:
        row_delta -= LOG2_E * tl.load(dlse + head * dlse_head + row, mask=row < stop, other=0.0)
    tl.store(delta + head * lse_head + row, row_delta, mask=row < stop)
    row_lse = tl.load(lse + head * lse_head + row, mask=row < stop, other=float("inf"))
    q_tile = load_tile(q + head * q_head, start, stop, q_row, ROWS, D, WIDTH, True)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    first_masked, last = tl.load(tile + 3), tl.load(tile + 4)
    for run in range(tl.load(tile + 2), first_masked):
        total = accumulate_dq(
            total, q_tile, dout_tile, row_lse, row_delta, k, v, visible_until, row,
            tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1), k_row, v_row, scale * LOG2_E,
            STEP, D, WIDTH, False, PRECISION,
        )  # fmt: skip
    for run in range(first_masked, last):
        total = accumulate_dq(
            total, q_tile, dout_tile, row_lse, row_delta, k, v, visible_until, row,
            tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1), k_row, v_row, scale * LOG2_E,
            STEP, D, WIDTH, True, PRECISION,
        )  # fmt: skip
    store_tile(dq + head * dq_head, start, stop, dq_row, total * scale, ROWS, D, WIDTH)


@triton.jit
def accumulate_dk_dv(
    dk, dv, k, v, q, dout, lse, delta, until, key, start, stop, q_row, dout_row, scale,
    STEP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the queries [start, stop) of one head give to dK / scale and dV (FlashAttention-2, algorithm 2).

    Scores are kept transposed, [keys, queries], so that both products read them as they are.
    """
    for first in tl.range(start, stop, STEP):
        row = first + tl.arange(0, STEP)
        q_tile = load_tile(q, first, stop, q_row, STEP, D, WIDTH, MASKED)
        if MASKED:  # a query past the run has no weight
            row_lse = tl.load(lse + row, mask=row < stop, other=float("inf"))
            row_delta = tl.load(delta + row, mask=row < stop, other=0.0)
        else:
            row_lse = tl.load(lse + row)
            row_delta = tl.load(delta + row)
        scores = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)
        if MASKED:
            visible = (key[:, None] <= row[None, :]) & (row[None, :] < until[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        weights = tl.exp2(scores * scale - row_lse[None, :])
        dout_tile = load_tile(dout, first, stop, dout_row, STEP, D, WIDTH, MASKED)
        dv = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(dout_tile), input_precision=PRECISION)
        dscores = weights * (dweights - row_delta[None, :])
        dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dk_dv_kernel(
    q, k, v, dout, lse, delta, dk, dv, parts, visible_until, tiles, runs,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, dk_row, dk_head, dv_row, dv_head, lse_head,
    part_slot, part_head, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, MAY_SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one key tile and one key head, summed over the GROUP query heads that share it.

    A tile with a slot writes float32 [2, ROWS, D] (dK, dV) into `parts` instead, for `combine_kernel`.
    """
    head = tl.cast(tl.program_id(0) % HEADS, tl.int64)
    tile = tiles + tl.program_id(0) // HEADS * TILE
    start, stop = tl.load(tile), tl.load(tile + 1)
    if start == stop:
        return
    key = start + tl.arange(0, ROWS)
    until = tl.load(visible_until + key, mask=key < stop, other=0)
    k_tile = load_tile(k + head * k_head, start, stop, k_row, ROWS, D, WIDTH, True)
    v_tile = load_tile(v + head * v_head, start, stop, v_row, ROWS, D, WIDTH, True)
    dk_tile = tl.zeros([ROWS, WIDTH], tl.float32)
    dv_tile = tl.zeros([ROWS, WIDTH], tl.float32)
    first_run, first_masked, last = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    for member in range(GROUP):
        query_head = head * GROUP + member
        for run in range(first_run, first_masked):
            dk_tile, dv_tile = accumulate_dk_dv(
                dk_tile, dv_tile, k_tile, v_tile, q + query_head * q_head, dout + query_head * dout_head,
                lse + query_head * lse_head, delta + query_head * lse_head, until, key,
                tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1), q_row, dout_row, scale * LOG2_E,
                STEP, D, WIDTH, False, PRECISION,
            )  # fmt: skip
        for run in range(first_masked, last):
            dk_tile, dv_tile = accumulate_dk_dv(
                dk_tile, dv_tile, k_tile, v_tile, q + query_head * q_head, dout + query_head * dout_head,
                lse + query_head * lse_head, delta + query_head * lse_head, until, key,
                tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1), q_row, dout_row, scale * LOG2_E,
                STEP, D, WIDTH, True, PRECISION,
            )  # fmt: skip
    dk_tile *= scale
    slot = -1
    if MAY_SPLIT:
        slot = tl.load(tile + 5)
    if slot < 0:
        store_tile(dk + head * dk_head, start, stop, dk_row, dk_tile, ROWS, D, WIDTH)
        store_tile(dv + head * dv_head, start, stop, dv_row, dv_tile, ROWS, D, WIDTH)
    else:
        part = parts + tl.cast(slot, tl.int64) * part_slot + head * part_head
        store_tile(part, 0, stop - start, D, dk_tile, ROWS, D, WIDTH)
        store_tile(part + ROWS * D, 0, stop - start, D, dv_tile, ROWS, D, WIDTH)


@triton.jit
def combine_kernel(
    parts, dk, dv, splits, dk_row, dk_head, dv_row, dv_head, part_slot, part_head,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one split key tile and one key head: its parts added in their order."""
    head = tl.cast(tl.program_id(0) % HEADS, tl.int64)
    split = splits + tl.program_id(0) // HEADS * SPLIT
    start, stop = tl.load(split), tl.load(split + 1)
    if start == stop:
        return
    parts += head * part_head
    first, last = tl.load(split + 2), tl.load(split + 3)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for slot in range(first, last):
        part = parts + tl.cast(slot, tl.int64) * part_slot
        total += load_tile(part, 0, stop - start, D, ROWS, D, WIDTH, True)
    store_tile(dk + head * dk_head, start, stop, dk_row, total, ROWS, D, WIDTH)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for slot in range(first, last):
        part = parts + tl.cast(slot, tl.int64) * part_slot + ROWS * D
        total += load_tile(part, 0, stop - start, D, ROWS, D, WIDTH, True)
    store_tile(dv + head * dv_head, start, stop, dv_row, total, ROWS, D, WIDTH)
