"""Triton kernel of sampling, a program a row, without a sort.

Logits are compared by integers that order as they do. Where a cut ends is searched in these: each pass over the row measures
what lies at or above PIVOTS keys at once, and leaves one part in PIVOTS of the range, so that after eight passes (four where
logits have 16 bits) one key is left. All sums are in one order; those in which a draw looks are float64, so that every token
can be drawn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIVOTS = 16
SHIFTS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # low bits that are zero in a float32 made of it
INFINITY = tl.constexpr(float("inf"))


def block_options(vocabulary: int) -> dict[str, int]:
    """Block sizes and warps by the length of a row."""
    block = min(triton.next_power_of_2(vocabulary), 4096)
    return {"BLOCK": block, "SEARCH_BLOCK": min(block, 1024), "PIVOTS": PIVOTS, "num_warps": 16 if block > 1024 else 4}


@triton.jit
def load_logits(logits, allowed, token, vocabulary, HAS_FORBIDDEN: tl.constexpr):
    """float32, with -inf for what must not be drawn or is no token; zeros of either sign are alike."""
    x = tl.load(logits + token, mask=token < vocabulary, other=-INFINITY).to(tl.float32) + 0.0
    if HAS_FORBIDDEN:
        x = tl.where(tl.load(allowed + token, mask=token < vocabulary, other=0) != 0, x, -INFINITY)
    return x


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """int32 that orders as float32 x does."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def load_measures(
    logits, allowed, token, vocabulary, largest, factor, edge, last,
    COUNTED: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Keys and measures: 1 where COUNTED, else weights; 0 below key `edge`, and at it from the id after `last` on."""
    x = load_logits(logits, allowed, token, vocabulary, HAS_FORBIDDEN)
    key = key_of(x, SHIFT)
    if COUNTED:
        measure = tl.where(x > -INFINITY, 1.0, 0.0)
    else:
        measure = tl.exp((x - largest) * factor)
    return key, tl.where((key > edge) | ((key == edge) & (token <= last)), measure, 0.0)


@triton.jit
def find_cut(
    logits, allowed, vocabulary, largest, factor, target, edge, last,
    COUNTED: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, SHIFT: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tighter cut (edge, last), see `load_measures`: the least probable token without which `target` is not reached."""
    low, high = edge.to(tl.int64), key_of(largest, SHIFT).to(tl.int64) + 1  # at `low` it is reached, at `high` it is not
    number = tl.arange(0, PIVOTS)
    held = tl.cast(0.0, tl.float64)  # by what has keys from `high` on
    while high - low > 1:
        step = tl.cdiv(high - low, PIVOTS)
        pivot = low + step * (number + 1)
        sums = tl.zeros([PIVOTS, BLOCK], tl.float32)
        for start in tl.range(0, vocabulary, BLOCK, num_stages=3):
            token = start + tl.arange(0, BLOCK)
            key, measure = load_measures(
                logits, allowed, token, vocabulary, largest, factor, edge, last, COUNTED, HAS_FORBIDDEN, SHIFT
            )
            sums += tl.where(key[None, :] >= pivot[:, None], measure[None, :], 0.0)
        totals = tl.sum(sums.to(tl.float64), 1)
        reached = tl.sum((totals >= target).to(tl.int32), 0)  # the first ones: the totals fall, rounded as they may be
        next_high = low + step * (reached + 1)
        if next_high < high:
            high = next_high
            held = tl.sum(tl.where(number == reached, totals, 0.0), 0)
        low += step * reached
    # tokens at the edge are alike, and are taken in the order of their ids
    new_edge, new_last = low.to(tl.int32), vocabulary - 1
    start = 0
    while start < vocabulary:
        token = start + tl.arange(0, BLOCK)
        key, measure = load_measures(
            logits, allowed, token, vocabulary, largest, factor, edge, last, COUNTED, HAS_FORBIDDEN, SHIFT
        )
        measure = tl.where(key == new_edge, measure, 0.0).to(tl.float64)
        running = held + tl.cumsum(measure, 0)
        new_last = tl.minimum(new_last, tl.min(tl.where((running >= target) & (measure > 0), token, vocabulary), 0))
        held += tl.sum(measure, 0)
        start = tl.where(held >= target, vocabulary, start + BLOCK)
    return new_edge, new_last


@triton.jit
def draw(
    logits, allowed, vocabulary, largest, factor, uniform, held, edge, last,
    HAS_FORBIDDEN: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token at which the running sum of the weights passes the share `uniform` of `held`."""
    target = uniform * held
    running = tl.cast(0.0, tl.float64)
    before = running
    start, found = 0, 0
    while start < vocabulary:
        token = start + tl.arange(0, BLOCK)
        _, weight = load_measures(
            logits, allowed, token, vocabulary, largest, factor, edge, last, False, HAS_FORBIDDEN, SHIFT
        )  # fmt: skip
        total = tl.sum(weight.to(tl.float64), 0)
        if total > 0:
            before = running
            found = start
        running += total
        start = tl.where(running > target, vocabulary, start + BLOCK)
    token = found + tl.arange(0, BLOCK)
    _, weight = load_measures(logits, allowed, token, vocabulary, largest, factor, edge, last, False, HAS_FORBIDDEN, SHIFT)
    passed = (before + tl.cumsum(weight.to(tl.float64), 0) > target) & (weight > 0)
    drawn = tl.min(tl.where(passed, token, vocabulary), 0)
    greatest = tl.max(tl.where(weight > 0, token, 0), 0)
    return tl.minimum(drawn, greatest)  # that one where rounding left the target beyond the last weight


@triton.jit
def sample_kernel(
    logits, uniforms, allowed, tokens, log_probabilities,
    logits_row, uniforms_row, vocabulary, factor, top_p, top_p_rest, top_k,
    GREEDY: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr, BLOCK: tl.constexpr, SEARCH_BLOCK: tl.constexpr,
):  # fmt: skip
    """The token and log-probability of one row; `factor` is 1 / temperature, top_p + top_p_rest the share in float64."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    largest_of_all = tl.full([BLOCK], -INFINITY, tl.float32)
    largest_allowed = tl.full([BLOCK], -INFINITY, tl.float32)
    for start in tl.range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        largest_of_all = tl.maximum(largest_of_all, load_logits(logits, allowed, token, vocabulary, False))
        largest_allowed = tl.maximum(largest_allowed, load_logits(logits, allowed, token, vocabulary, HAS_FORBIDDEN))
    peak, largest = tl.max(largest_of_all, 0), tl.max(largest_allowed, 0)

    edge, last = key_of(tl.full([], -INFINITY, tl.float32), SHIFT), vocabulary - 1  # nothing is cut
    normalizer, held = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
    drawn = vocabulary
    for start in tl.range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = load_logits(logits, allowed, token, vocabulary, False)
        normalizer += tl.sum(tl.exp(x - peak), 0).to(tl.float64)
        x = load_logits(logits, allowed, token, vocabulary, HAS_FORBIDDEN)
        if GREEDY:
            drawn = tl.minimum(drawn, tl.min(tl.where((x == largest) & (token < vocabulary), token, vocabulary), 0))
        else:
            held += tl.sum(tl.exp((x - largest) * factor).to(tl.float64), 0)
    if not GREEDY:
        if HAS_TOP_K:
            edge, last = find_cut(
                logits, allowed, vocabulary, largest, factor, tl.cast(top_k, tl.float64), edge, last,
                True, HAS_FORBIDDEN, SHIFT, PIVOTS, SEARCH_BLOCK,
            )  # fmt: skip
            held = held_by(logits, allowed, vocabulary, largest, factor, edge, last, HAS_FORBIDDEN, SHIFT, BLOCK)
        if HAS_TOP_P:
            target = (tl.cast(top_p, tl.float64) + tl.cast(top_p_rest, tl.float64)) * held
            edge, last = find_cut(
                logits, allowed, vocabulary, largest, factor, target, edge, last,
                False, HAS_FORBIDDEN, SHIFT, PIVOTS, SEARCH_BLOCK,
            )  # fmt: skip
            held = held_by(logits, allowed, vocabulary, largest, factor, edge, last, HAS_FORBIDDEN, SHIFT, BLOCK)
        uniform = tl.load(uniforms + row * uniforms_row)
        drawn = draw(
            logits, allowed, vocabulary, largest, factor, uniform, held, edge, last, HAS_FORBIDDEN, SHIFT, BLOCK
        )  # fmt: skip
    drawn = tl.minimum(drawn, vocabulary - 1)  # also of what is not a number
    tl.store(tokens + row, drawn.to(tl.int64))
    logit = tl.load(logits + drawn).to(tl.float32)
    tl.store(log_probabilities + row, (logit - peak - tl.log(normalizer)).to(tl.float32))


@triton.jit
def held_by(
    logits, allowed, vocabulary, largest, factor, edge, last,
    HAS_FORBIDDEN: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of the weights that a cut leaves, in the blocks of `draw`."""
    held = tl.cast(0.0, tl.float64)
    for start in tl.range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        _, weight = load_measures(
            logits, allowed, token, vocabulary, largest, factor, edge, last, False, HAS_FORBIDDEN, SHIFT
        )  # fmt: skip
        held += tl.sum(weight.to(tl.float64), 0)
    return held


def sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int, forbidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """int64 [B] tokens and float32 [B] log-probabilities; see `sampling.sample_tokens`."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    log_probabilities = torch.empty(rows, dtype=torch.float32, device=logits.device)
    allowed = tokens
    if forbidden is not None:
        allowed = torch.ones(vocabulary, dtype=torch.int8, device=logits.device).index_fill_(0, forbidden, 0)
    near = torch.tensor(top_p, dtype=torch.float32).item()  # what a kernel takes of a float
    sample_kernel[(rows,)](
        logits, uniforms, allowed, tokens, log_probabilities, logits.stride(0), uniforms.stride(0), vocabulary,
        1 / temperature if temperature else 0.0, near, top_p - near, top_k,
        GREEDY=temperature == 0, HAS_TOP_P=top_p < 1, HAS_TOP_K=0 < top_k < vocabulary, HAS_FORBIDDEN=forbidden is not None,
        SHIFT=SHIFTS[logits.dtype], **block_options(vocabulary),
    )  # fmt: skip
    return tokens, log_probabilities
