"""Triton kernel of `repeats`: a program a row, which walks over the lags."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST_RUN = tl.constexpr((1 << 15) - 1)
BLOCK = 1024  # lags at a time


@triton.jit(do_not_specialize=["width"])
def repeats_kernel(
    runs, drawn, lengths, found, runs_row, drawn_row, lengths_row, tokens, width, BLOCK: tl.constexpr
):  # fmt: skip
    """New `runs` of one row, see `repeats.repeats`, and whether one is `width` long."""
    row = tl.program_id(0).to(tl.int64)
    runs += row * runs_row
    drawn += row * drawn_row
    newest = tl.load(lengths + row * lengths_row) - 1
    token = tl.load(drawn + newest, mask=newest >= 0, other=0)
    longest = tl.zeros([BLOCK], tl.int32)
    stop = tl.where(newest == 0, tokens, newest + 1)  # lags beyond are 0, but in a row that begins; none of an idle row's
    for start in tl.range(0, stop, BLOCK):
        lag = start + tl.arange(0, BLOCK)
        within = (lag > 0) & (lag <= newest)
        equal = tl.load(drawn + newest - lag, mask=within, other=0) == token
        run = tl.minimum(tl.load(runs + lag, mask=within, other=0).to(tl.int32) + 1, LONGEST_RUN)
        run = tl.where(equal & within, run, 0)
        tl.store(runs + lag, run.to(tl.int16), mask=lag < tokens)
        longest = tl.maximum(longest, run)
    tl.store(found + row, tl.max(longest, 0) >= width)


def repeats(suffix_lengths: Tensor, tokens: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Launch the kernel: bool [B]; see `api.repeats`."""
    rows, capacity = suffix_lengths.shape
    repeated = torch.empty(rows, dtype=torch.bool, device=suffix_lengths.device)
    repeats_kernel[(rows,)](
        suffix_lengths, tokens, lengths, repeated,
        suffix_lengths.stride(0), tokens.stride(0), lengths.stride(0), capacity, width,
        BLOCK=min(triton.next_power_of_2(capacity), BLOCK), num_warps=4,
    )  # fmt: skip
    return repeated
