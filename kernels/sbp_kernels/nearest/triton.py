"""Triton kernel of `nearest_in_buckets`: a program for a tile of queries that are shown the same bucket.

Products stay in registers. Those that reach a query's K-th best so far wait in a row of global memory, and only when a row has
no room for one more tile of members are rows sorted and merged into the lists. So a round costs its products and mostly one
merge, where merging after every tile would cost about as much as the products. What waits and what is listed is compared as
integers that order as (product, lower place) does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbp_kernels.layout.device_plan import tiles_of_runs

AMD = torch.version.hip is not None
INFINITY = tl.constexpr(float("inf"))
NOTHING = tl.constexpr((-0x7F800001 << 32) + (1 << 31))  # key_of(-inf, -1)


def block_options(neighbours: int, dtype: torch.dtype) -> dict[str, Any]:
    """Block sizes, precision of products, warps and stages, by the length of a list and the type of the vectors."""
    kept = max(2, triton.next_power_of_2(neighbours))
    room = max(64, kept)
    wide = dtype == torch.float32
    return {
        "NEIGHBOURS": neighbours,
        "KEPT": kept,
        "ROOM": room,  # at least BLOCK_M, for what a tile may add to an empty row
        "ROWS": max(1, 1024 // room),  # that are sorted at once, in 64-bit integers: more would spill
        "BLOCK_Q": 64,
        "BLOCK_M": 64,
        "BLOCK_D": 32 if wide else 64,
        # tf32x3 multiplies on tensor cores and adds the chunks of BLOCK_D in float32, outside of them
        "PRECISION": "tf32x3" if wide and not AMD else "ieee",
        "num_warps": 4,
        "num_stages": 3,
    }


@triton.jit
def key_of(score, place):
    """int64 that orders as the score does, equal scores by lower place; zeros of either sign are alike."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | (0x7FFFFFFF - place.to(tl.int64))


@triton.jit
def score_of(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def place_of(key):
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def products_of(
    queries, members, row, place, last, queries_row, members_row, width,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_Q, BLOCK_M]."""
    column = tl.arange(0, BLOCK_D)
    q = queries + row[:, None] * queries_row + column[None, :]
    m = members + place.to(tl.int64)[:, None] * members_row + column[None, :]
    score = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
    for start in tl.range(0, width, BLOCK_D):
        within = column[None, :] < width - start
        left = tl.load(q + start, mask=within, other=0.0)
        right = tl.load(m + start, mask=within & (place[:, None] < last), other=0.0)
        score = tl.dot(left, tl.trans(right), score, input_precision=PRECISION)
    return score


@triton.jit
def merge(
    scores, places, waiting, counts, order, queries, scores_row, places_row,
    NEIGHBOURS: tl.constexpr, KEPT: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Put what waits for the queries of a tile into their lists, ROWS queries at a time."""
    slot, column = tl.arange(0, ROOM)[None, :], tl.arange(0, KEPT)[None, :]
    tl.debug_barrier()  # other threads wrote what is read here
    for first in tl.range(0, queries, ROWS):
        query = first + tl.arange(0, ROWS)
        used = query < queries
        row = tl.load(order + query, mask=used, other=0)[:, None]
        count = tl.load(counts + query, mask=used, other=0)[:, None]
        key = tl.load(waiting + query[:, None] * ROOM + slot, mask=slot < count, other=NOTHING)
        held = used[:, None] & (column < NEIGHBOURS)
        score = tl.load(scores + row * scores_row + column, mask=held, other=-INFINITY)
        place = tl.load(places + row * places_row + column, mask=held, other=-1)
        # of two sorted lists, one of them turned round, the greater at each place are the KEPT best of both (Batcher 1968)
        best = tl.maximum(key_of(score, place), tl.flip(tl.topk(key, KEPT), 1))
        best = tl.bitonic_merge(best, descending=True)
        tl.debug_barrier()  # all have read what is written here
        tl.store(scores + row * scores_row + column, score_of(best), mask=held)
        tl.store(places + row * places_row + column, place_of(best), mask=held)
    tl.debug_barrier()


@triton.jit
def nearest_kernel(
    scores, places, queries, own, members, order, tiles, waiting, counts,
    scores_row, places_row, queries_row, members_row, own_row, width,
    NEIGHBOURS: tl.constexpr, KEPT: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Show the members of a bucket to a tile of its queries; see `nearest.nearest_in_buckets`."""
    tiles += 4 * tl.program_id(0)
    start, stop, first, last = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2), tl.load(tiles + 3)
    order += start
    counts += start
    waiting += start.to(tl.int64) * ROOM
    query = tl.arange(0, BLOCK_Q)
    used = query < stop - start
    row = tl.load(order + query, mask=used, other=0)
    own_place = tl.load(own + row * own_row).to(tl.int32)
    threshold = tl.load(scores + row * scores_row + NEIGHBOURS - 1, mask=used, other=INFINITY)
    count = tl.zeros([BLOCK_Q], tl.int32)
    member = first
    while member < last:
        place = member + tl.arange(0, BLOCK_M)
        score = products_of(
            queries, members, row, place, last, queries_row, members_row, width, BLOCK_Q, BLOCK_M, BLOCK_D, PRECISION
        )
        shown = (place[None, :] < last) & (place[None, :] != own_place[:, None])
        better = shown & (score >= threshold[:, None])
        number = tl.cumsum(better.to(tl.int32), 1)
        added = tl.max(number, 1)
        # a branch, as sorting for nothing would cost more: in all rounds but the first few products reach the threshold
        if tl.max(count + added, 0) > ROOM:
            # this tile is computed again after the merge, which is rare: kept meanwhile, it would spill
            tl.store(counts + query, count, mask=used)
            merge(
                scores, places, waiting, counts, order, stop - start, scores_row, places_row, NEIGHBOURS, KEPT, ROOM, ROWS
            )  # fmt: skip
            threshold = tl.load(scores + row * scores_row + NEIGHBOURS - 1, mask=used, other=INFINITY)
            count = tl.zeros([BLOCK_Q], tl.int32)
        else:
            slot = (query * ROOM + count - 1)[:, None] + number
            tl.store(waiting + slot, key_of(score, place[None, :]), mask=better)
            count += added
            member += BLOCK_M
    if tl.max(count, 0) > 0:
        tl.store(counts + query, count, mask=used)
        merge(scores, places, waiting, counts, order, stop - start, scores_row, places_row, NEIGHBOURS, KEPT, ROOM, ROWS)


def nearest_in_buckets(
    scores: Tensor, indices: Tensor, queries: Tensor, own_index: Tensor, buckets: Tensor, members: Tensor, starts: Tensor
) -> None:
    """Launch the kernel; see `api.nearest_in_buckets`."""
    options = block_options(scores.shape[1], members.dtype)
    order, tiles = tiles_of(buckets, starts, options["BLOCK_Q"])
    waiting = torch.empty(len(queries), options["ROOM"], dtype=torch.int64, device=queries.device)
    counts = torch.empty(len(queries), dtype=torch.int32, device=queries.device)
    nearest_kernel[(len(tiles),)](
        scores, indices, queries, own_index, members, order, tiles, waiting, counts,
        scores.stride(0), indices.stride(0), queries.stride(0), members.stride(0), own_index.stride(0), queries.shape[1],
        **options,
    )  # fmt: skip


def tiles_of(buckets: Tensor, starts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Queries in the order of their buckets, int64 [Q], and tiles of at most `rows` of them, int32 [T, 4].

    A tile's columns: its first and last position in that order, and the first and last member of its bucket; ends exclusive.
    The number of tiles follows from shapes, so that there is no host-device synchronisation; tiles that are not needed are
    empty and have no members.
    """
    by_bucket, order = buckets.sort(stable=True)
    ends = torch.searchsorted(by_bucket, torch.arange(len(starts) - 1, device=buckets.device), right=True)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    start, stop, _, _ = tiles_of_runs(begins, ends, len(buckets), rows)
    bucket = by_bucket[start]
    first, last = starts[bucket], starts[bucket + 1]
    return order, torch.stack([start, stop, first, torch.where(stop > start, last, first)], 1).int()
