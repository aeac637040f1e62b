"""Triton kernels of `linear_cross_entropy`.

Sizes in the shapes below: T tokens, H width, V vocabulary, C rows that may carry loss, of which the first `count` do, a
number on the device; B rows of one slab; P columns of one panel of the vocabulary. Statistics, coefficients and targets are
described in `operations`. Every kernel is deterministic and has no atomics. Products are accumulated in
float32 by persistent programs which read `count` themselves: a tile of rows beyond it costs nothing.
"""

import triton
import triton.language as tl

NO_LOGIT = tl.constexpr(-float("inf"))


@triton.jit
def _capped(logit, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(logit / softcap), by the series where 1 - exp(-2 x) would cancel."""
    if HAS_SOFTCAP:
        x = logit / softcap
        square = x * x
        near_zero = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
        decay = tl.exp(-2 * tl.abs(x))
        elsewhere = tl.where(x < 0, decay - 1, 1 - decay) / (1 + decay)
        return softcap * tl.where(tl.abs(x) < 0.2, near_zero, elsewhere)
    return logit


@triton.jit
def _relative(target, target_logit, largest, vocabulary):
    """Target's logit less the largest: 0 where the target is none of this vocabulary's, NaN where it does not exist."""
    return tl.where(target >= vocabulary, float("nan"), tl.where(target < 0, 0.0, target_logit - largest))


@triton.jit
def _logit_gradient(logit, hit, largest, a, b, c, softcap, HAS_SOFTCAP: tl.constexpr, WITH_SUM: tl.constexpr):
    """Of a * sum of exp(logit - largest) + b * target's logit + c * sum of logits; `logit` is capped, as in these."""
    gradient = a * tl.exp(logit - largest)
    gradient = tl.where(hit, gradient + b, gradient)
    if WITH_SUM:
        gradient += c
    if HAS_SOFTCAP:
        slope = logit / softcap
        gradient *= 1 - slope * slope
    return gradient


@triton.jit
def _tile_of(unit, row_tiles, others, GROUP: tl.constexpr):
    """Units in an order in which GROUP tiles of rows pass by before the other coordinate moves, for the L2 cache."""
    per_group = GROUP * others
    first = (unit // per_group) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = unit % per_group
    return first + within % height, within // height


@triton.jit(do_not_specialize=["tokens"])
def gather_rows_kernel(source_ptr, rows_ptr, out_ptr, stride_source, stride_out, tokens, width, BLOCK: tl.constexpr):
    """out [B, H] = source [T, H] at rows [B]; zeros where a row is no row."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    readable = tl.where(row < tokens, width, 0)
    values = tl.load(source_ptr + row * stride_source + columns, mask=columns < readable, other=0.0)
    tl.store(out_ptr + index * stride_out + columns, values, mask=columns < width)


@triton.jit(do_not_specialize=["tokens"])
def scatter_rows_kernel(
    source_ptr, rows_ptr, scale_ptr, out_ptr, stride_source, stride_out, tokens, width, BLOCK: tl.constexpr
):  # fmt: skip
    """out [T, H] at rows [B] = scale * source [B, H]; nothing where a row is no row."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < tl.where(row < tokens, width, 0)
    values = tl.load(source_ptr + index * stride_source + columns, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        values *= tl.load(scale_ptr)
    tl.store(out_ptr + row * stride_out + columns, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def slab_kernel(
    logits_ptr, targets_ptr, statistics_ptr, coefficients_ptr,
    stride_logits, stride_statistics, stride_coefficients, vocabulary, z_loss, softcap,
    BLOCK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WITH_SUM: tl.constexpr, STATISTICS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """A row of logits [B, V] to its statistics [4, B], then, in place, to its gradient; one program a row.

    The statistics are written where STATISTICS, else read. A row is read from memory once for the statistics and once for the
    gradient: the rows that a device works on at a time are some 200 MB, which its L2 cache does not hold.
    """
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride_logits
    statistics_ptr += row
    z_loss, softcap = tl.full([], z_loss, tl.float32), tl.full([], softcap, tl.float32)
    target = tl.load(targets_ptr + row)
    if STATISTICS:
        known = (target >= 0) & (target < vocabulary)
        target_logit = _capped(tl.load(logits_ptr + target, mask=known, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)
        largest = tl.full([], NO_LOGIT, tl.float32)
        total = tl.zeros([], tl.float32)
        logit_sum = tl.zeros([], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            logit = _capped(tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)
            if WITH_SUM:
                logit_sum += tl.sum(logit, 0)
            logit = tl.where(inside, logit, NO_LOGIT)
            now = tl.maximum(largest, tl.max(logit, 0))
            total = total * tl.exp(largest - now) + tl.sum(tl.exp(logit - now), 0)
            largest = now
        tl.store(statistics_ptr, largest)
        tl.store(statistics_ptr + stride_statistics, total)
        tl.store(statistics_ptr + 2 * stride_statistics, _relative(target, target_logit, largest, vocabulary))
        tl.store(statistics_ptr + 3 * stride_statistics, logit_sum)
        tl.debug_barrier()  # the target's logit is read by all threads before any of them overwrites it
    if GRADIENT:
        a = tl.load(coefficients_ptr + row)
        b = tl.load(coefficients_ptr + stride_coefficients + row)
        c = tl.load(coefficients_ptr + 2 * stride_coefficients + row)
        if STATISTICS:
            a *= (1 + 2 * z_loss * (largest + tl.log(total))) / total
        else:
            largest = tl.load(statistics_ptr)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            logit = _capped(tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)
            gradient = _logit_gradient(logit, columns == target, largest, a, b, c, softcap, HAS_SOFTCAP, WITH_SUM)
            tl.store(logits_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def statistics_kernel(
    hidden, weight, targets_ptr, count_ptr, partial_ptr, stride_split, stride_kind, vocabulary, width, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, WITH_SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest logit, sum of exponentials, target's logit and sum of logits of rows over one split of the vocabulary.

    hidden [C, H] and weight [V, H] are tensor descriptors; partial is [SPLITS, 4, C]. A product whose tiles never leave the
    registers: each is reduced over its columns as soon as it is complete.
    """
    softcap = tl.full([], softcap, tl.float32)
    count = tl.load(count_ptr)
    row_tiles = tl.cdiv(count, ROWS)
    tiles = tl.cdiv(tl.cdiv(vocabulary, COLUMNS), SPLITS)
    for unit in tl.range(tl.program_id(0), row_tiles * SPLITS, tl.num_programs(0)):
        row_tile, split = _tile_of(unit, row_tiles, SPLITS, GROUP)
        rows = row_tile * ROWS + tl.arange(0, ROWS)
        target = tl.load(targets_ptr + rows, mask=rows < count, other=-1)
        largest = tl.full([ROWS], NO_LOGIT, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        target_logit = tl.zeros([ROWS], tl.float32)
        logit_sum = tl.zeros([ROWS], tl.float32)
        last = tl.minimum((split + 1) * tiles, tl.cdiv(vocabulary, COLUMNS))
        for tile in tl.range(split * tiles, last):
            product = tl.zeros([ROWS, COLUMNS], tl.float32)
            for inner in tl.range(0, width, INNER):
                x = hidden.load([row_tile * ROWS, inner])
                w = weight.load([tile * COLUMNS, inner])
                product = tl.dot(x, w.T, product, input_precision=PRECISION)
            logit = _capped(product, softcap, HAS_SOFTCAP)
            columns = tile * COLUMNS + tl.arange(0, COLUMNS)
            target_logit += tl.sum(tl.where(columns[None, :] == target[:, None], logit, 0.0), 1)
            if WITH_SUM:
                logit_sum += tl.sum(logit, 1)  # columns beyond the vocabulary were read as zeros
            logit = tl.where((columns < vocabulary)[None, :], logit, NO_LOGIT)
            now = tl.maximum(largest, tl.max(logit, 1))
            total = total * tl.exp(largest - now) + tl.sum(tl.exp(logit - now[:, None]), 1)
            largest = now
        out = partial_ptr + split.to(tl.int64) * stride_split + rows
        tl.store(out, largest, mask=rows < count)
        tl.store(out + stride_kind, total, mask=rows < count)
        tl.store(out + 2 * stride_kind, target_logit, mask=rows < count)
        tl.store(out + 3 * stride_kind, logit_sum, mask=rows < count)


@triton.jit(do_not_specialize=["capacity"])
def combine_kernel(
    partial_ptr, targets_ptr, count_ptr, statistics_ptr, stride_split, stride_kind, stride_statistics, capacity, vocabulary,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [SPLITS, 4, C] -> statistics [4, C]; beyond `count` those of no logits: 0, 1, 0, 0."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = rows < tl.load(count_ptr)
    target = tl.load(targets_ptr + rows, mask=live, other=-1)
    largest = tl.full([BLOCK], NO_LOGIT, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    target_logit = tl.zeros([BLOCK], tl.float32)
    logit_sum = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        part = partial_ptr + split * stride_split + rows
        peak = tl.load(part, mask=live, other=0.0)
        now = tl.maximum(largest, peak)
        total = total * tl.exp(largest - now) + tl.load(part + stride_kind, mask=live, other=0.0) * tl.exp(peak - now)
        largest = now
        target_logit += tl.load(part + 2 * stride_kind, mask=live, other=0.0)
        logit_sum += tl.load(part + 3 * stride_kind, mask=live, other=0.0)
    out = statistics_ptr + rows
    tl.store(out, largest, mask=rows < capacity)
    tl.store(out + stride_statistics, tl.where(live, total, 1.0), mask=rows < capacity)
    tl.store(out + 2 * stride_statistics, _relative(target, target_logit, largest, vocabulary), mask=rows < capacity)
    tl.store(out + 3 * stride_statistics, logit_sum, mask=rows < capacity)


@triton.jit(do_not_specialize=["first_column", "columns"])
def logit_gradient_kernel(
    hidden, weight, gradient, targets_ptr, count_ptr, largest_ptr, coefficients_ptr,
    stride_coefficients, first_column, columns, width, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, WITH_SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gradient [C, P] of the logits of one panel of the vocabulary, from hidden [C, H] and weight [P, H]: descriptors all.

    Rows from `count` to the end of their tile become zeros.
    """
    softcap = tl.full([], softcap, tl.float32)
    count = tl.load(count_ptr)
    row_tiles = tl.cdiv(count, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    for unit in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, tile = _tile_of(unit, row_tiles, column_tiles, GROUP)
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for inner in tl.range(0, width, INNER):
            x = hidden.load([row_tile * ROWS, inner])
            w = weight.load([tile * COLUMNS, inner])
            product = tl.dot(x, w.T, product, input_precision=PRECISION)
        rows = row_tile * ROWS + tl.arange(0, ROWS)
        live = rows < count
        target = tl.load(targets_ptr + rows, mask=live, other=-1) - first_column - tile * COLUMNS
        largest = tl.load(largest_ptr + rows, mask=live, other=0.0)[:, None]
        a = tl.load(coefficients_ptr + rows, mask=live, other=0.0)[:, None]
        b = tl.load(coefficients_ptr + stride_coefficients + rows, mask=live, other=0.0)[:, None]
        c = tl.load(coefficients_ptr + 2 * stride_coefficients + rows, mask=live, other=0.0)[:, None]
        hit = tl.arange(0, COLUMNS)[None, :] == target[:, None]
        logit = _capped(product, softcap, HAS_SOFTCAP)
        values = _logit_gradient(logit, hit, largest, a, b, c, softcap, HAS_SOFTCAP, WITH_SUM)
        gradient.store([row_tile * ROWS, tile * COLUMNS], values.to(gradient.dtype))


@triton.jit(do_not_specialize=["columns"])
def hidden_gradient_kernel(
    gradient, weight, count_ptr, out_ptr, stride_out, columns, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [C, H] in float32 (+)= gradient [C, P] @ weight [P, H], which are descriptors; out is padded to whole tiles."""
    count = tl.load(count_ptr)
    row_tiles = tl.cdiv(count, ROWS)
    column_tiles = tl.cdiv(width, COLUMNS)
    for unit in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, tile = _tile_of(unit, row_tiles, column_tiles, GROUP)
        rows = row_tile * ROWS + tl.arange(0, ROWS)
        place = tile * COLUMNS + tl.arange(0, COLUMNS)
        out = out_ptr + rows.to(tl.int64)[:, None] * stride_out + place[None, :]
        if ACCUMULATE:
            product = tl.load(out)
        else:
            product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for inner in tl.range(0, columns, INNER):
            g = gradient.load([row_tile * ROWS, inner])
            w = weight.load([inner, tile * COLUMNS])
            product = tl.dot(g, w, product, input_precision=PRECISION)
        tl.store(out, product)


@triton.jit(do_not_specialize=["columns"])
def weight_gradient_kernel(
    gradient, hidden, out, count_ptr, scale_ptr, columns, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [P, H] = scale * gradient [C, P].T @ hidden [C, H], which are descriptors."""
    count = tl.load(count_ptr)
    scale = tl.load(scale_ptr)
    row_tiles = tl.cdiv(columns, ROWS)
    column_tiles = tl.cdiv(width, COLUMNS)
    for unit in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, tile = _tile_of(unit, row_tiles, column_tiles, GROUP)
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for inner in tl.range(0, count, INNER):
            g = gradient.load([inner, row_tile * ROWS])
            x = hidden.load([inner, tile * COLUMNS])
            product = tl.dot(g.T, x, product, input_precision=PRECISION)
        out.store([row_tile * ROWS, tile * COLUMNS], (product * scale).to(out.dtype))
