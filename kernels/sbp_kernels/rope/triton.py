"""Triton kernels of query and key norm with rotary embedding.

A program holds the cosines and sines of its tokens and walks through heads, first those of the queries, then of the keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbp_kernels.rope.api import frequencies_of

_MADE: dict[tuple[float, int, torch.device], Tensor] = {}  # base, width of a head, device -> frequencies
TILE = 1024  # elements of half a head, of all tokens of a program
HEADS_OF_A_PROGRAM = 16  # about; fewer give more programs and more cosines computed twice


def block_options(head_width: int) -> dict[str, int]:
    """Block sizes and warps of both kernels, by the width of a head."""
    block_half = triton.next_power_of_2(head_width // 2)
    return {"BLOCK_TOKENS": max(1, TILE // block_half), "BLOCK_HALF": block_half, "num_warps": 4}


@triton.jit
def _cosine_sine(positions, frequencies, o_token, o_half, tokens, HALF: tl.constexpr):
    """Float32 cosine and sine [tokens, HALF], from the angle within its quarter turn, at most pi / 4 either way."""
    b_position = tl.load(positions + o_token, mask=o_token < tokens, other=0).to(tl.int64)
    b_frequency = tl.load(frequencies + o_half, mask=o_half < HALF, other=0)
    b_turn = (b_position * b_frequency >> 32).to(tl.int32)  # 2**-32 turns; whole turns fell off at the top
    b_quarter = (b_turn + 2**29) >> 30
    b_angle = (b_turn - (b_quarter << 30)).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2**32
    b_square = b_angle * b_angle
    # minimax polynomials on [-pi / 4, pi / 4], off by 4e-9 and 1e-10 before rounding; tl.sin and tl.cos would reduce any
    # float32 angle, with a table in local memory
    b_sine = -1.9517297914717346e-04 * b_square + 8.332177996635437e-03
    b_sine = b_angle + b_angle * b_square * (b_sine * b_square - 1.6666655242443085e-01)
    b_cosine = 2.4438451873720624e-05 * b_square - 1.388736767694354e-03
    b_cosine = b_square * b_square * (b_cosine * b_square + 4.166664555668831e-02) + (1.0 - 0.5 * b_square)
    b_odd = (b_quarter & 1) != 0
    b_cosine, b_sine = tl.where(b_odd, b_sine, b_cosine), tl.where(b_odd, b_cosine, b_sine)
    b_cosine = tl.where(((b_quarter + 1) & 2) != 0, -b_cosine, b_cosine)
    return b_cosine, tl.where((b_quarter & 2) != 0, -b_sine, b_sine)


@triton.jit
def _load_halves(p_first, m_block, HALF: tl.constexpr):
    b_first = tl.load(p_first, mask=m_block, other=0).to(tl.float32)
    return b_first, tl.load(p_first + HALF, mask=m_block, other=0).to(tl.float32)


@triton.jit
def _store_halves(p_first, b_first, b_second, m_block, HALF: tl.constexpr):
    tl.store(p_first, b_first.to(p_first.dtype.element_ty), mask=m_block)
    tl.store(p_first + HALF, b_second.to(p_first.dtype.element_ty), mask=m_block)


@triton.jit
def _forward_heads(
    qkv, weight, out, rstd, b_cosine, b_sine, o_token, o_half, m_block,
    qkv_token_stride, qkv_head_stride, tokens, epsilon,
    HEADS: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """This program's share of HEADS heads; qkv and rstd point at the first of them."""
    for i_head in range(tl.program_id(1), HEADS, tl.num_programs(1)):
        o_head = tl.cast(i_head, tl.int64)
        b_first, b_second = _load_halves(qkv + o_token * qkv_token_stride + o_head * qkv_head_stride + o_half, m_block, HALF)
        if HAS_NORM:
            b_squares = tl.sum(b_first * b_first + b_second * b_second, 1, keep_dims=True)
            b_rstd = tl.rsqrt((b_squares / (2 * HALF) + epsilon).to(tl.float32))
            tl.store(rstd + o_head * tokens + o_token, b_rstd, mask=o_token < tokens)
            b_first_weight, b_second_weight = _load_halves(weight + o_half, o_half < HALF, HALF)
            b_first, b_second = b_first * b_rstd * b_first_weight, b_second * b_rstd * b_second_weight
        p_out = out + (o_token * HEADS + o_head) * (2 * HALF) + o_half
        b_turned_first = b_first * b_cosine - b_second * b_sine
        b_turned_second = b_second * b_cosine + b_first * b_sine
        _store_halves(p_out, b_turned_first, b_turned_second, m_block, HALF)


@triton.jit(do_not_specialize=["tokens"])
def qk_norm_rope_forward_kernel(
    qkv, q_weight, k_weight, positions, frequencies, q, k, rstd, qkv_token_stride, qkv_head_stride, tokens, epsilon,
    HEADS: tl.constexpr, KEY_VALUE_HEADS: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """q, k and rstd [HEADS + KEY_VALUE_HEADS, tokens] of the first HEADS + KEY_VALUE_HEADS heads of qkv."""
    o_token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    o_half = tl.arange(0, BLOCK_HALF)[None, :]
    m_block = (o_token < tokens) & (o_half < HALF)
    b_cosine, b_sine = _cosine_sine(positions, frequencies, o_token, o_half, tokens, HALF)
    _forward_heads(
        qkv, q_weight, q, rstd, b_cosine, b_sine, o_token, o_half, m_block,
        qkv_token_stride, qkv_head_stride, tokens, epsilon, HEADS, HALF, HAS_NORM,
    )  # fmt: skip
    qkv += tl.cast(HEADS, tl.int64) * qkv_head_stride
    rstd += tl.cast(HEADS, tl.int64) * tokens
    _forward_heads(
        qkv, k_weight, k, rstd, b_cosine, b_sine, o_token, o_half, m_block,
        qkv_token_stride, qkv_head_stride, tokens, epsilon, KEY_VALUE_HEADS, HALF, HAS_NORM,
    )  # fmt: skip


@triton.jit
def _backward_heads(
    gradient, qkv, weight, rstd, qkv_gradient, p_partial, b_cosine, b_sine, o_token, o_half, m_block,
    gradient_token_stride, gradient_head_stride, qkv_token_stride, qkv_head_stride, tokens,
    HEADS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Gradient of this program's share of HEADS heads, and its share of their weight's, stored at p_partial."""
    b_first_share = tl.zeros_like(b_cosine)
    b_second_share = tl.zeros_like(b_cosine)
    for i_head in range(tl.program_id(1), HEADS, tl.num_programs(1)):
        o_head = tl.cast(i_head, tl.int64)
        b_turned_first, b_turned_second = _load_halves(
            gradient + o_token * gradient_token_stride + o_head * gradient_head_stride + o_half, m_block, HALF
        )
        b_first_gradient = b_turned_first * b_cosine + b_turned_second * b_sine
        b_second_gradient = b_turned_second * b_cosine - b_turned_first * b_sine
        if HAS_NORM:
            b_first, b_second = _load_halves(
                qkv + o_token * qkv_token_stride + o_head * qkv_head_stride + o_half, m_block, HALF
            )
            b_rstd = tl.load(rstd + o_head * tokens + o_token, mask=o_token < tokens, other=0)
            b_first, b_second = b_first * b_rstd, b_second * b_rstd
            b_first_share += b_first_gradient * b_first
            b_second_share += b_second_gradient * b_second
            b_first_weight, b_second_weight = _load_halves(weight + o_half, o_half < HALF, HALF)
            b_first_gradient *= b_first_weight
            b_second_gradient *= b_second_weight
            b_product = b_first_gradient * b_first + b_second_gradient * b_second
            b_mean = tl.sum(b_product, 1, keep_dims=True) / (2 * HALF)
            b_first_gradient = b_rstd * (b_first_gradient - b_first * b_mean)
            b_second_gradient = b_rstd * (b_second_gradient - b_second * b_mean)
        p_gradient = qkv_gradient + (o_token * ROWS + o_head) * (2 * HALF) + o_half
        _store_halves(p_gradient, b_first_gradient, b_second_gradient, m_block, HALF)
    if HAS_NORM:
        b_first_share = tl.sum(b_first_share, 0, keep_dims=True)
        b_second_share = tl.sum(b_second_share, 0, keep_dims=True)
        _store_halves(p_partial + o_half, b_first_share, b_second_share, o_half < HALF, HALF)


@triton.jit(do_not_specialize=["tokens"])
def qk_norm_rope_backward_kernel(
    q_gradient, k_gradient, v_gradient, qkv, q_weight, k_weight, positions, frequencies, rstd,
    qkv_gradient, weight_partials,
    q_gradient_token_stride, q_gradient_head_stride, k_gradient_token_stride, k_gradient_head_stride,
    v_gradient_token_stride, v_gradient_head_stride, qkv_token_stride, qkv_head_stride, tokens,
    HEADS: tl.constexpr, KEY_VALUE_HEADS: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """qkv_gradient, contiguous, with that of the values copied into its place; weight_partials [programs, 2, D]."""
    ROWS: tl.constexpr = HEADS + 2 * KEY_VALUE_HEADS
    o_token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    o_half = tl.arange(0, BLOCK_HALF)[None, :]
    m_block = (o_token < tokens) & (o_half < HALF)
    b_cosine, b_sine = _cosine_sine(positions, frequencies, o_token, o_half, tokens, HALF)
    i_program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    p_partial = weight_partials + i_program.to(tl.int64) * (4 * HALF)
    _backward_heads(
        q_gradient, qkv, q_weight, rstd, qkv_gradient, p_partial, b_cosine, b_sine, o_token, o_half, m_block,
        q_gradient_token_stride, q_gradient_head_stride, qkv_token_stride, qkv_head_stride, tokens,
        HEADS, ROWS, HALF, HAS_NORM,
    )  # fmt: skip
    qkv += tl.cast(HEADS, tl.int64) * qkv_head_stride
    rstd += tl.cast(HEADS, tl.int64) * tokens
    qkv_gradient += HEADS * 2 * HALF
    _backward_heads(
        k_gradient, qkv, k_weight, rstd, qkv_gradient, p_partial + 2 * HALF, b_cosine, b_sine, o_token, o_half, m_block,
        k_gradient_token_stride, k_gradient_head_stride, qkv_token_stride, qkv_head_stride, tokens,
        KEY_VALUE_HEADS, ROWS, HALF, HAS_NORM,
    )  # fmt: skip
    qkv_gradient += KEY_VALUE_HEADS * 2 * HALF
    for i_head in range(tl.program_id(1), KEY_VALUE_HEADS, tl.num_programs(1)):
        o_head = tl.cast(i_head, tl.int64)
        b_first, b_second = _load_halves(
            v_gradient + o_token * v_gradient_token_stride + o_head * v_gradient_head_stride + o_half, m_block, HALF
        )
        _store_halves(qkv_gradient + (o_token * ROWS + o_head) * (2 * HALF) + o_half, b_first, b_second, m_block, HALF)


def forward(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    frequencies: Tensor | None,
    heads: int,
    key_value_heads: int,
    theta: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [T, Hq, D], k [T, Hkv, D] and rstd [Hq + Hkv, T], empty without norms, of qkv [T, Hq + 2 Hkv, D]."""
    tokens, _, width = qkv.shape
    qkv = _with_adjacent_columns(qkv)
    q = torch.empty(tokens, heads, width, dtype=qkv.dtype, device=qkv.device)
    k = torch.empty(tokens, key_value_heads, width, dtype=qkv.dtype, device=qkv.device)
    rstd = torch.empty(0 if q_weight is None else (heads + key_value_heads, tokens), device=qkv.device)
    options = block_options(width)
    qk_norm_rope_forward_kernel[_grid(tokens, heads + key_value_heads, options)](
        qkv,
        *_weights(q_weight, k_weight, qkv),
        positions.contiguous(),
        _frequencies(frequencies, theta, width, qkv.device),
        q,
        k,
        rstd,
        qkv.stride(0),
        qkv.stride(1),
        tokens,
        float(eps),
        HEADS=heads,
        KEY_VALUE_HEADS=key_value_heads,
        HALF=width // 2,
        HAS_NORM=q_weight is not None,
        **options,
    )
    return q, k, rstd


def backward(
    q_gradient: Tensor,
    k_gradient: Tensor,
    v_gradient: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    frequencies: Tensor | None,
    rstd: Tensor,
    theta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv [T, Hq + 2 Hkv, D], contiguous, and of the weights [D], empty where there are none."""
    tokens, rows, width = qkv.shape
    heads, key_value_heads = q_gradient.shape[1], k_gradient.shape[1]
    qkv, q_gradient, k_gradient, v_gradient = map(_with_adjacent_columns, (qkv, q_gradient, k_gradient, v_gradient))
    qkv_gradient = torch.empty(tokens, rows, width, dtype=qkv.dtype, device=qkv.device)
    options = block_options(width)
    grid = _grid(tokens, heads + key_value_heads, options)
    partials = torch.empty(0 if q_weight is None else (grid[0] * grid[1], 2, width), device=qkv.device)
    qk_norm_rope_backward_kernel[grid](
        q_gradient,
        k_gradient,
        v_gradient,
        qkv,
        *_weights(q_weight, k_weight, qkv),
        positions.contiguous(),
        _frequencies(frequencies, theta, width, qkv.device),
        rstd,
        qkv_gradient,
        partials,
        *(x.stride(dimension) for x in (q_gradient, k_gradient, v_gradient, qkv) for dimension in (0, 1)),
        tokens,
        HEADS=heads,
        KEY_VALUE_HEADS=key_value_heads,
        HALF=width // 2,
        HAS_NORM=q_weight is not None,
        **options,
    )
    if q_weight is None or k_weight is None:
        return qkv_gradient, qkv.new_empty(0), qkv.new_empty(0)
    sums = partials.sum(0)
    return qkv_gradient, sums[0].to(q_weight.dtype, copy=True), sums[1].to(k_weight.dtype, copy=True)


def _grid(tokens: int, normed_heads: int, options: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(tokens, options["BLOCK_TOKENS"]), max(1, normed_heads // HEADS_OF_A_PROGRAM)


def _weights(q_weight: Tensor | None, k_weight: Tensor | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    if q_weight is None or k_weight is None:
        return unused, unused
    return q_weight.contiguous(), k_weight.contiguous()


def _frequencies(frequencies: Tensor | None, theta: float, head_width: int, device: torch.device) -> Tensor:
    """Return the given frequencies, or those of theta, which are made once for a device and kept for good.

    Memory that is allocated while a CUDA graph is captured belongs to the graph, and holds values only after a replay: what
    is made then is part of that graph alone. What graphs were captured with must not go, so nothing is ever dropped.
    """
    if frequencies is not None:
        return frequencies.contiguous()
    key = theta, head_width, device
    if key in _MADE:
        return _MADE[key]
    made = frequencies_of(theta, head_width, device)
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        _MADE[key] = made
    return made


def _with_adjacent_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
