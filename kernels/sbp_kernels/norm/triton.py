"""Triton kernels of RMSNorm.

A row that fits one block stays in registers between its statistic and its result; only for wider rows does a kernel of
its own compute the statistic first. The weight's gradient is summed by each program over its rows, then over programs,
always in the same order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# rows up to so many elements stay in a program's registers, without spilling; the backward holds more for each element
WIDEST_FORWARD_ROW = 16384
WIDEST_BACKWARD_ROW = 8192
TILE = 4096  # elements that a program handles at a time, unless it keeps a longer row


def forward_options(width: int) -> dict[str, int]:
    """Block sizes and warps of the forward kernel and of `row_product_kernel`, by the width of a row."""
    return _options(width, WIDEST_FORWARD_ROW)


def backward_options(width: int) -> dict[str, int]:
    """Block sizes and warps of the backward kernel, by the width of a row."""
    return _options(width, WIDEST_BACKWARD_ROW)


def _options(width: int, widest_row: int) -> dict[str, int]:
    block_width = triton.next_power_of_2(width) if width <= widest_row else TILE
    return {
        "BLOCK_ROWS": max(1, TILE // block_width),
        "BLOCK_WIDTH": block_width,
        "num_warps": 8 if block_width <= TILE else 16,
    }


def backward_programs(row_blocks: int, column_blocks: int, device: torch.device) -> int:
    """Programs that share the blocks of rows: two on each multiprocessor, so that few partial sums are left to add."""
    return min(row_blocks, max(1, 2 * _multiprocessors(device) // column_blocks))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit(do_not_specialize=["rows"])
def row_product_kernel(
    x, y, weight, product, x_stride, y_stride, rows,
    WIDTH: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """product[row] = sum of x * y * weight over a row that is wider than a block."""
    o_row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    m_row = o_row < rows
    b_product = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        o_column = start + tl.arange(0, BLOCK_WIDTH)
        m_block = m_row[:, None] & (o_column < WIDTH)[None, :]
        b_x = tl.load(x + o_row[:, None] * x_stride + o_column[None, :], mask=m_block, other=0).to(tl.float32)
        b_y = tl.load(y + o_row[:, None] * y_stride + o_column[None, :], mask=m_block, other=0).to(tl.float32)
        if HAS_WEIGHT:
            b_y *= tl.load(weight + o_column, mask=o_column < WIDTH, other=0).to(tl.float32)[None, :]
        b_product += b_x * b_y
    tl.store(product + o_row, tl.sum(b_product, 1), mask=m_row)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward_kernel(
    x, residual, weight, squares, y, total, rstd, x_stride, residual_stride, rows, epsilon,
    WIDTH: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """y, x + residual, and 1 / sqrt(mean of squares + epsilon); `squares` [rows] is read where rows are wider than a block."""
    o_row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    m_row, m_column = o_row < rows, o_column < WIDTH
    m_block = m_row[:, None] & m_column[None, :]
    o_block = o_row[:, None] * WIDTH + o_column[None, :]
    b_x = tl.load(x + o_row[:, None] * x_stride + o_column[None, :], mask=m_block, other=0).to(tl.float32)
    if HAS_RESIDUAL:
        b_x += tl.load(residual + o_row[:, None] * residual_stride + o_column[None, :], mask=m_block, other=0).to(tl.float32)
        b_total = b_x.to(total.dtype.element_ty)
        tl.store(total + o_block, b_total, mask=m_block)
        b_x = b_total.to(tl.float32)  # the backward knows the rounded sum alone
    if BLOCK_WIDTH >= WIDTH:
        b_squares = tl.sum(b_x * b_x, 1)
    else:
        b_squares = tl.load(squares + o_row, mask=m_row, other=0)
    b_rstd = tl.rsqrt((b_squares / WIDTH + epsilon).to(tl.float32))
    b_weight = tl.load(weight + o_column, mask=m_column, other=0).to(tl.float32)
    b_y = b_x * b_rstd[:, None] * b_weight[None, :]
    tl.store(y + o_block, b_y.to(y.dtype.element_ty), mask=m_block)
    if tl.program_id(1) == 0:
        tl.store(rstd + o_row, b_rstd, mask=m_row)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    gradient, sum_gradient, x, weight, rstd, products, x_gradient, weight_partials,
    gradient_stride, sum_gradient_stride, x_stride, rows,
    WIDTH: tl.constexpr, HAS_SUM_GRADIENT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """x_gradient, and this program's share of the weight's gradient; `products` as `squares` in the forward."""
    o_column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    m_column = o_column < WIDTH
    b_weight = tl.load(weight + o_column, mask=m_column, other=0).to(tl.float32)[None, :]
    b_share = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for i_block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        o_row = (i_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        m_row = o_row < rows
        m_block = m_row[:, None] & m_column[None, :]
        o_block = o_row[:, None] * WIDTH + o_column[None, :]
        b_x = tl.load(x + o_row[:, None] * x_stride + o_column[None, :], mask=m_block, other=0).to(tl.float32)
        b_gradient = tl.load(gradient + o_row[:, None] * gradient_stride + o_column[None, :], mask=m_block, other=0)
        b_gradient = b_gradient.to(tl.float32)
        b_rstd = tl.load(rstd + o_row, mask=m_row, other=0)
        b_normed = b_x * b_rstd[:, None]
        b_share += b_gradient * b_normed
        b_gradient *= b_weight
        if BLOCK_WIDTH >= WIDTH:
            b_product = tl.sum(b_gradient * b_normed, 1)
        else:
            b_product = tl.load(products + o_row, mask=m_row, other=0) * b_rstd
        b_x_gradient = b_rstd[:, None] * (b_gradient - b_normed * (b_product / WIDTH)[:, None])
        if HAS_SUM_GRADIENT:
            b_x_gradient += tl.load(
                sum_gradient + o_row[:, None] * sum_gradient_stride + o_column[None, :], mask=m_block, other=0
            ).to(tl.float32)
        tl.store(x_gradient + o_block, b_x_gradient.to(x_gradient.dtype.element_ty), mask=m_block)
    o_share = tl.program_id(0).to(tl.int64) * WIDTH + o_column
    tl.store(weight_partials + o_share, tl.sum(b_share, 0), mask=m_column)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y [..., W] and rstd [...]."""
    y, _, rstd = forward(x, None, weight, eps)
    return y, rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [..., W], the sum and rstd [...]."""
    return forward(x, residual, weight, eps)


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the sum (x itself where there is no residual) and rstd [...] of x [..., W]."""
    options = forward_options(x.shape[-1])
    y, rstd = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape[:-1], device=x.device)
    wide = x.shape[-1] > options["BLOCK_WIDTH"]
    total = x
    if residual is not None and wide:
        total, residual = x + residual, None
        x = total
    elif residual is not None:
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows = as_rows(x)
    residual_rows = x_rows if residual is None else as_rows(residual)
    rows, width = x_rows.shape
    squares = _row_products(x_rows, x_rows, None) if wide else rstd
    grid = (triton.cdiv(rows, options["BLOCK_ROWS"]), triton.cdiv(width, options["BLOCK_WIDTH"]))
    rms_norm_forward_kernel[grid](
        x_rows,
        residual_rows,
        weight.contiguous(),
        squares,
        y,
        total,
        rstd,
        x_rows.stride(0),
        residual_rows.stride(0),
        rows,
        float(eps),
        WIDTH=width,
        HAS_RESIDUAL=residual is not None,
        **options,
    )
    return y, total, rstd


def backward(gradient: Tensor, sum_gradient: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed, shaped as x [..., W], and of the weight [W]."""
    options = backward_options(x.shape[-1])
    x_gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows, gradient_rows = as_rows(x), as_rows(gradient)
    sum_gradient_rows = gradient_rows if sum_gradient is None else as_rows(sum_gradient)
    rows, width = x_rows.shape
    weight = weight.contiguous()
    products = _row_products(gradient_rows, x_rows, weight) if width > options["BLOCK_WIDTH"] else rstd
    column_blocks = triton.cdiv(width, options["BLOCK_WIDTH"])
    programs = backward_programs(triton.cdiv(rows, options["BLOCK_ROWS"]), column_blocks, x.device)
    partials = torch.empty(programs, width, device=x.device)
    rms_norm_backward_kernel[programs, column_blocks](
        gradient_rows,
        sum_gradient_rows,
        x_rows,
        weight,
        rstd,
        products,
        x_gradient,
        partials,
        gradient_rows.stride(0),
        sum_gradient_rows.stride(0),
        x_rows.stride(0),
        rows,
        WIDTH=width,
        HAS_SUM_GRADIENT=sum_gradient is not None,
        **options,
    )
    return x_gradient, partials.sum(0).to(weight.dtype)


def _row_products(x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
    rows, width = x.shape
    options = forward_options(width)
    product = torch.empty(rows, device=x.device)
    row_product_kernel[(triton.cdiv(rows, options["BLOCK_ROWS"]),)](
        x,
        y,
        x if weight is None else weight,
        product,
        x.stride(0),
        y.stride(0),
        rows,
        WIDTH=width,
        HAS_WEIGHT=weight is not None,
        **options,
    )
    return product


def as_rows(x: Tensor) -> Tensor:
    """View x [..., W] as [rows, W] with neighbouring columns side by side, copied only where its strides force it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
