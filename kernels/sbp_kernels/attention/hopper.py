"""A warp-specialised forward for Hopper: one warp group copies tiles, two multiply (after FlashAttention-3, Shah et al. 2024).

Off by default: it has been compiled but not measured on a GPU. So it refuses to run on a device until `self_check` has seen it
repeat its bits there, which its first call does by itself. Triton 3.6 specialises a loop only in a narrow shape, which
this kernel keeps to: four warps, one loop without a branch, tiles loaded through tensor descriptors alone. So it walks the
runs of a tile by arithmetic and masks every step. Unlike the plain kernel it reads whole steps: a value that is not finite
within a step of a run's end reaches rows that must not see it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sbp_kernels.attention.self_check import check
from sbp_kernels.attention.triton import LOG2_E, TILE, store_tile

ALIGNMENT = tl.constexpr(4)  # tokens: descriptors copy from multiples of 16 bytes, and `visible_until` holds 4 bytes a token


@triton.jit
def specialised_forward_kernel(
    q, k, v, visible_until, out, lse, tiles, runs, out_row, out_head, lse_head, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out and lse of one query tile and one query head; q, k, v and visible_until are tensor descriptors."""
    head = tl.program_id(0) % HEADS
    tile = tiles + tl.program_id(0) // HEADS * TILE
    start, stop = tl.load(tile), tl.load(tile + 1)
    # no early exit for the padding of the table, which the specialisation does not survive: it has no runs and stores nothing
    scale *= LOG2_E
    column = head // GROUP * D
    row = start + tl.arange(0, ROWS)
    run, end = tl.load(tile + 2), tl.load(tile + 4)
    steps = 0
    for index in range(run, end):
        steps += tl.cdiv(tl.load(runs + 2 * index + 1) - tl.load(runs + 2 * index) // ALIGNMENT * ALIGNMENT, STEP)
    begin, last = tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1)
    first = begin // ALIGNMENT * ALIGNMENT
    q_tile = q.load([start, head * D])
    total = tl.zeros([ROWS, D], tl.float32)
    largest = tl.full([ROWS], -1e38, tl.float32)
    normalizer = tl.zeros([ROWS], tl.float32)
    for _ in tl.range(0, steps, warp_specialize=True, num_stages=STAGES):
        scores = tl.dot(q_tile, tl.trans(k.load([first, column])), input_precision=PRECISION)
        key = first + tl.arange(0, STEP)
        until = visible_until.load([first])
        visible = (key[None, :] <= row[:, None]) & (row[:, None] < until[None, :]) & ((key >= begin) & (key < last))[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        normalizer = normalizer * shrink + tl.sum(weights, 1)
        v_tile = v.load([first, column])
        total = tl.dot(weights.to(v_tile.dtype), v_tile, total * shrink[:, None], input_precision=PRECISION)
        largest = new_largest
        ended = first + STEP >= last
        run = tl.minimum(run + ended.to(tl.int32), end - 1)
        begin, last = tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1)
        first = tl.where(ended, begin // ALIGNMENT * ALIGNMENT, first + STEP)
    head = tl.cast(head, tl.int64)
    store_tile(out + head * out_head, start, stop, out_row, total / normalizer[:, None], ROWS, D, D)
    tl.store(lse + head * lse_head + row, largest + tl.log2(normalizer), mask=row < stop)


def forward(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, tiles: Tensor, runs: Tensor, scale: float, rows: int, step: int
) -> tuple[Tensor, Tensor]:
    """Compute out [T, Hq, D] and lse [Hq, T], in base 2, over the query tiles of a plan.

    Raises:
        ValueError: the device is no Hopper GPU, or failed `self_check`, or has not been checked and a CUDA graph is being
            captured.
    """
    if q.is_cuda:
        check("triton-hopper", launch, (q.device, q.shape[2], q.dtype, rows, step), release="3.6")
    return launch(q, k, v, visible_until, tiles, runs, scale, rows, step)


def launch(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, tiles: Tensor, runs: Tensor, scale: float, rows: int, step: int
) -> tuple[Tensor, Tensor]:
    """Compute what `forward` returns, without its checks."""
    (tokens, heads, head_width), key_heads = q.shape, k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    if tokens == 0:  # there are no descriptors of nothing
        return out, lse
    specialised_forward_kernel[(len(tiles) * heads,)](
        _matrix(q, rows), _matrix(k, step), _matrix(v, step), TensorDescriptor.from_tensor(visible_until, [step]),
        out, lse, tiles, runs, *out.stride()[:2], lse.stride(0), scale,
        HEADS=heads, GROUP=heads // key_heads, D=head_width, ROWS=rows, STEP=step,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **specialised_options(head_width),
    )  # fmt: skip
    return out, lse


def specialised_options(head_width: int) -> dict[str, int]:
    """Launch options; Triton 3.6 ignores the specialisation of any other number of warps."""
    stages = 3 if head_width <= 64 else 2
    return {"STAGES": stages, "num_stages": stages, "num_warps": 4}


def _matrix(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of [T, H, D] as [T, H * D], in blocks of `rows` rows of one head."""
    if x.stride(1) != x.shape[2] or x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16:
        x = x.contiguous()
    flat = x.as_strided((x.shape[0], x.shape[1] * x.shape[2]), (x.stride(0), 1))
    return TensorDescriptor.from_tensor(flat, [rows, x.shape[2]])
