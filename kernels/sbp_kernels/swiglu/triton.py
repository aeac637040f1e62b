"""Triton kernels of SwiGLU: one pass over memory forward, one backward, which can hand out the product again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbp_kernels.norm.triton import as_rows

WIDEST_BLOCK = 1024
TILE = 4096  # elements of the product that a program computes


def block_options(width: int) -> dict[str, int]:
    """Block sizes and warps of both kernels, by the width F of the product."""
    block_width = min(triton.next_power_of_2(width), WIDEST_BLOCK)
    return {"BLOCK_ROWS": TILE // block_width, "BLOCK_WIDTH": block_width, "num_warps": 8}


@triton.jit
def _offsets(rows, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows and columns of this program's block and which of them exist; neighbouring programs share rows."""
    i_row = tl.program_id(0) // tl.cdiv(WIDTH, BLOCK_WIDTH)
    i_column = tl.program_id(0) % tl.cdiv(WIDTH, BLOCK_WIDTH)
    o_row = (i_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    o_column = (i_column * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH))[None, :]
    return o_row, o_column, (o_row < rows) & (o_column < WIDTH)


@triton.jit
def _sigmoids(b_x):
    """Sigmoid of x and of -x, by an exponential that is at most 1, so that nothing overflows or cancels."""
    b_exponential = tl.exp(-tl.abs(b_x))
    b_greater = 1.0 / (1.0 + b_exponential)
    b_less = b_exponential * b_greater
    return tl.where(b_x >= 0, b_greater, b_less), tl.where(b_x >= 0, b_less, b_greater)


@triton.jit(do_not_specialize=["rows"])
def swiglu_forward_kernel(
    gate_up, product, gate_up_stride, rows,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """product [rows, F] = silu(gate) * up of gate_up [rows, 2F]."""
    o_row, o_column, m_block = _offsets(rows, WIDTH, BLOCK_ROWS, BLOCK_WIDTH)
    p_gate = gate_up + o_row * gate_up_stride + o_column
    b_gate = tl.load(p_gate, mask=m_block, other=0).to(tl.float32)
    b_up = tl.load(p_gate + WIDTH, mask=m_block, other=0).to(tl.float32)
    b_sigmoid, _ = _sigmoids(b_gate)
    b_product = b_gate * b_sigmoid * b_up
    tl.store(product + o_row * WIDTH + o_column, b_product.to(product.dtype.element_ty), mask=m_block)


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward_kernel(
    gradient, gate_up, gate_up_gradient, product, gradient_stride, gate_up_stride, rows,
    WIDTH: tl.constexpr, EMIT_PRODUCT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """gate_up_gradient [rows, 2F] from the product's gradient [rows, F], and the product once more if asked for."""
    o_row, o_column, m_block = _offsets(rows, WIDTH, BLOCK_ROWS, BLOCK_WIDTH)
    p_gate = gate_up + o_row * gate_up_stride + o_column
    b_gate = tl.load(p_gate, mask=m_block, other=0).to(tl.float32)
    b_up = tl.load(p_gate + WIDTH, mask=m_block, other=0).to(tl.float32)
    b_gradient = tl.load(gradient + o_row * gradient_stride + o_column, mask=m_block, other=0).to(tl.float32)
    b_sigmoid, b_complement = _sigmoids(b_gate)
    b_silu = b_gate * b_sigmoid
    b_gate_gradient = b_gradient * b_up * (b_sigmoid + b_silu * b_complement)
    p_gate_gradient = gate_up_gradient + o_row * (2 * WIDTH) + o_column
    tl.store(p_gate_gradient, b_gate_gradient.to(gate_up_gradient.dtype.element_ty), mask=m_block)
    tl.store(p_gate_gradient + WIDTH, (b_gradient * b_silu).to(gate_up_gradient.dtype.element_ty), mask=m_block)
    if EMIT_PRODUCT:
        tl.store(product + o_row * WIDTH + o_column, (b_silu * b_up).to(product.dtype.element_ty), mask=m_block)


def forward(gate_up: Tensor) -> Tensor:
    """[..., F] of gate_up [..., 2F]."""
    width = gate_up.shape[-1] // 2
    product = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    gate_up_rows = as_rows(gate_up)
    options = block_options(width)
    swiglu_forward_kernel[_grid(len(gate_up_rows), width, options)](
        gate_up_rows, product, gate_up_rows.stride(0), len(gate_up_rows), WIDTH=width, **options
    )
    return product


def backward(gradient: Tensor, gate_up: Tensor, emit_product: bool) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up [..., 2F], and the product [..., F] or, where that is not wanted, an empty tensor."""
    width = gate_up.shape[-1] // 2
    gate_up_gradient = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    product = torch.empty(gradient.shape if emit_product else 0, dtype=gate_up.dtype, device=gate_up.device)
    gate_up_rows, gradient_rows = as_rows(gate_up), as_rows(gradient)
    options = block_options(width)
    swiglu_backward_kernel[_grid(len(gate_up_rows), width, options)](
        gradient_rows,
        gate_up_rows,
        gate_up_gradient,
        product,
        gradient_rows.stride(0),
        gate_up_rows.stride(0),
        len(gate_up_rows),
        WIDTH=width,
        EMIT_PRODUCT=emit_product,
        **options,
    )
    return gate_up_gradient, product


def _grid(rows: int, width: int, options: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, options["BLOCK_ROWS"]) * triton.cdiv(width, options["BLOCK_WIDTH"]),)
