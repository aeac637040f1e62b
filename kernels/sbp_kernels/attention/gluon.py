"""A forward for Hopper in the shape of FlashAttention-3 (Shah et al. 2024), in Gluon: one warp copies, groups of four multiply.

A group has 64 of a tile's queries; of tiles of 64 two blocks share a multiprocessor. While the product of one step's weights
and values runs, the group works on the exponentials of the next step's scores. As in the plain kernel, steps that every query
sees have no mask.

Off by default: it has been compiled, and run on a model of its copies and barriers, but not measured on a GPU. So it refuses to
run on a device until `self_check` has seen it repeat its bits there, which its first call does by itself. Unlike the plain
kernel it reads whole steps: a value that is not finite within a step of a run's end reaches rows that must not see it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sbp_kernels.attention.self_check import check
from sbp_kernels.layout.plan import TILE_COLUMNS

async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name in Triton 3.6
LOG2_E = gl.constexpr(1.4426950408889634)
TILE = gl.constexpr(TILE_COLUMNS)
ROWS = gl.constexpr(64)  # queries of a group of four warps, as many as a product of theirs has
COPYING_REGISTERS, MULTIPLYING_REGISTERS = gl.constexpr(24), gl.constexpr(240)  # of a thread
TWO_BLOCKS = 128  # registers of a thread, on average, with which two blocks of eight warps fit on a multiprocessor


@gluon.jit
def copy_tile(source, row, column, tiles, ready, free, step, STAGES: gl.constexpr):
    """Copy a step's tile into its buffer, once every group has done with the tile before."""
    slot = step % STAGES
    mbarrier.wait(free.index(slot), step // STAGES & 1 ^ 1)
    mbarrier.expect(ready.index(slot), source.block_type.nbytes)
    async_load(source, [row, column], ready.index(slot), tiles.index(slot))


@gluon.jit
def copy_tiles(
    q, k, v, runs, start, run, end, q_column, k_column,
    q_tiles, q_ready, k_tiles, k_ready, k_free, v_tiles, v_ready, v_free,
    GROUPS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the queries of the groups, then keys and values of every step."""
    for group in gl.static_range(GROUPS):
        mbarrier.expect(q_ready.index(group), q.block_type.nbytes)
        async_load(q, [start + group * ROWS, q_column], q_ready.index(group), q_tiles.index(group))
    step = 0
    for index in range(run, end):
        for first in range(gl.load(runs + 2 * index), gl.load(runs + 2 * index + 1), STEP):
            copy_tile(k, first, k_column, k_tiles, k_ready, k_free, step, STAGES)
            copy_tile(v, first, k_column, v_tiles, v_ready, v_free, step, STAGES)
            step += 1


@gluon.jit
def multiply_keys(q_tile, k_tiles, k_ready, step, STEP: gl.constexpr, STAGES: gl.constexpr):
    """Begin the product of queries and a step's keys, [64, STEP]."""
    slot = step % STAGES
    mbarrier.wait(k_ready.index(slot), step // STAGES & 1)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    nothing = gl.zeros([ROWS, STEP], gl.float32, layout)
    return warpgroup_mma(q_tile, k_tiles.index(slot).permute([1, 0]), nothing, use_acc=False, is_async=True)


@gluon.jit
def multiply_values(weights, total, v_tiles, v_ready, step, STAGES: gl.constexpr):
    """Begin to add the product of a step's weights and values to the sum, [64, D]."""
    slot = step % STAGES
    mbarrier.wait(v_ready.index(slot), step // STAGES & 1)
    return warpgroup_mma(weights, v_tiles.index(slot), total, is_async=True)


@gluon.jit
def hide(scores, visible_until, row, first, stop):
    """Scores of the keys from `first` on, -inf where a query does not see a key."""
    key = first + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    until = gl.load(visible_until + key, mask=key < stop, other=0)
    visible = (key[None, :] <= row[:, None]) & (row[:, None] < until[None, :])
    return gl.where(visible, scores, float("-inf"))


@gluon.jit
def soften(scores, largest, normalizer, scale):
    """Take scores into the online softmax in base 2: weights, by what earlier sums shrink, and the new maxima and sums."""
    new_largest = gl.maximum(largest, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_largest[:, None])
    shrink = gl.exp2(largest - new_largest)
    return weights, shrink, new_largest, normalizer * shrink + gl.sum(weights, 1)


@gluon.jit
def as_operand(weights, dtype: gl.constexpr, D: gl.constexpr):
    """Weights rounded, where the product with the values reads them from registers."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, layout, 2))


@gluon.jit
def attend_runs(
    total, largest, normalizer, weights, step, skipped, run, end, runs, visible_until, row, scale,
    q_tile, k_tiles, k_ready, k_free, v_tiles, v_ready, v_free,
    STEP: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Multiply the weights of the step before with its values while each further step is taken in.

    `step` is the number of steps so far; the first `skipped` keys of the first run are among them.
    """
    for index in range(run, end):
        stop = gl.load(runs + 2 * index + 1)
        for first in range(gl.load(runs + 2 * index) + skipped, stop, STEP):
            scores = multiply_keys(q_tile, k_tiles, k_ready, step, STEP, STAGES)
            total = multiply_values(weights, total, v_tiles, v_ready, step - 1, STAGES)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(k_free.index(step % STAGES))
            if MASKED:
                scores = hide(scores, visible_until, row, first, stop)
            next_weights, shrink, largest, normalizer = soften(scores, largest, normalizer, scale)
            next_weights = as_operand(next_weights, k_tiles.dtype, D)
            # passed at once: without a branch here ptxas puts the wait for the product before the exponentials
            mbarrier.wait(v_ready.index((step - 1) % STAGES), (step - 1) // STAGES & 1)
            total, weights = warpgroup_mma_wait(0, deps=[total, weights])  # the product reads `weights` until here
            mbarrier.arrive(v_free.index((step - 1) % STAGES))
            total *= gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None]
            weights = next_weights
            step += 1
        skipped = 0
    return total, largest, normalizer, weights, step, skipped


@gluon.jit
def attend(
    group: gl.constexpr, start, stop, run, first_masked, end, runs, visible_until, out, lse, out_row, scale,
    q_tiles, q_ready, k_tiles, k_ready, k_free, v_tiles, v_ready, v_free,
    STEP: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Compute out and lse of a group's 64 queries."""
    q_tile = q_tiles.index(group)
    mbarrier.wait(q_ready.index(group), 0)
    scores = warpgroup_mma_wait(0, deps=[multiply_keys(q_tile, k_tiles, k_ready, 0, STEP, STAGES)])
    mbarrier.arrive(k_free.index(0))
    # the first step is masked, whether it needs it or not
    rows: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    row = start + group * ROWS + gl.arange(0, ROWS, rows)
    scores = hide(scores, visible_until, row, gl.load(runs + 2 * run), gl.load(runs + 2 * run + 1))
    largest, normalizer = gl.full([ROWS], -1e38, gl.float32, rows), gl.zeros([ROWS], gl.float32, rows)
    weights, _, largest, normalizer = soften(scores, largest, normalizer, scale)
    weights = as_operand(weights, k_tiles.dtype, D)
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    total = gl.zeros([ROWS, D], gl.float32, sums)
    step, skipped = 1, STEP
    total, largest, normalizer, weights, step, skipped = attend_runs(
        total, largest, normalizer, weights, step, skipped, run, first_masked, runs, visible_until, row, scale,
        q_tile, k_tiles, k_ready, k_free, v_tiles, v_ready, v_free, STEP, STAGES, D, False,
    )  # fmt: skip
    total, largest, normalizer, weights, step, skipped = attend_runs(
        total, largest, normalizer, weights, step, skipped, first_masked, end, runs, visible_until, row, scale,
        q_tile, k_tiles, k_ready, k_free, v_tiles, v_ready, v_free, STEP, STAGES, D, True,
    )  # fmt: skip
    total = multiply_values(weights, total, v_tiles, v_ready, step - 1, STAGES)
    total, weights = warpgroup_mma_wait(0, deps=[total, weights])
    gl.store(lse + row, largest + gl.log2(normalizer), mask=row < stop)
    total /= gl.convert_layout(normalizer, gl.SliceLayout(1, total.type.layout))[:, None]
    store_rows(out, total, start + group * ROWS, stop, out_row, D)


@gluon.jit
def store_rows(out, values, start, stop, out_row, D: gl.constexpr):
    """Write rows `start` to `stop` of a [T, D] matrix from [64, D], 16 bytes a thread."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    values = gl.convert_layout(values.to(out.dtype.element_ty), wide)
    row = start + gl.arange(0, ROWS, gl.SliceLayout(1, wide))[:, None]
    column = gl.arange(0, D, gl.SliceLayout(0, wide))[None, :]
    gl.store(out + row.to(gl.int64) * out_row + column, values, mask=row < stop)


@gluon.jit
def forward_kernel(
    q, k, v, visible_until, out, lse, tiles, runs, out_row, out_head, lse_head, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    GROUPS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute out and lse of one query tile and one query head; q, k and v are tensor descriptors of [T, heads * D]."""
    head = gl.program_id(0) % HEADS
    tile = tiles + gl.program_id(0) // HEADS * TILE
    start, stop = gl.load(tile), gl.load(tile + 1)
    if start == stop:
        return
    run, first_masked, end = gl.load(tile + 2), gl.load(tile + 3), gl.load(tile + 4)
    q_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS, ROWS, D], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, STEP, D], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, STEP, D], v.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(GROUPS):
        mbarrier.init(q_ready.index(group), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(v_ready.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=GROUPS)
        mbarrier.init(v_free.index(slot), count=GROUPS)
    out += gl.cast(head, gl.int64) * out_head
    lse += gl.cast(head, gl.int64) * lse_head
    scale *= LOG2_E
    # Gluon takes no starred arguments
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (attend, (
                    gl.constexpr(0), start, stop, run, first_masked, end, runs, visible_until, out, lse, out_row, scale,
                    q_tiles, q_ready, k_tiles, k_ready, k_free, v_tiles, v_ready, v_free, STEP, STAGES, D,
                )),
                (copy_tiles, (
                    q, k, v, runs, start, run, end, head * D, head // GROUP * D,
                    q_tiles, q_ready, k_tiles, k_ready, k_free, v_tiles, v_ready, v_free, GROUPS, STEP, STAGES,
                )),
            ],
            [1],
            [COPYING_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (attend, (
                    gl.constexpr(0), start, stop, run, first_masked, end, runs, visible_until, out, lse, out_row, scale,
                    q_tiles, q_ready, k_tiles, k_ready, k_free, v_tiles, v_ready, v_free, STEP, STAGES, D,
                )),
                (attend, (
                    gl.constexpr(1), start, stop, run, first_masked, end, runs, visible_until, out, lse, out_row, scale,
                    q_tiles, q_ready, k_tiles, k_ready, k_free, v_tiles, v_ready, v_free, STEP, STAGES, D,
                )),
                (copy_tiles, (
                    q, k, v, runs, start, run, end, head * D, head // GROUP * D,
                    q_tiles, q_ready, k_tiles, k_ready, k_free, v_tiles, v_ready, v_free, GROUPS, STEP, STAGES,
                )),
            ],
            [4, 1],
            [MULTIPLYING_REGISTERS, COPYING_REGISTERS],
        )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, tiles: Tensor, runs: Tensor, scale: float, rows: int, step: int
) -> tuple[Tensor, Tensor]:
    """Compute out [T, Hq, D] and lse [Hq, T], in base 2, over the query tiles of a plan.

    Raises:
        ValueError: the device is no Hopper GPU, or failed `self_check`, or has not been checked and a CUDA graph is being
            captured; or the tiles are not of 64 or 128 queries.
    """
    if rows not in (64, 128):
        raise ValueError(f"tiles of {rows} queries: backend 'gluon-hopper' takes plans with 64 or 128")
    check("gluon-hopper", launch, (q.device, q.shape[2], q.dtype, rows, step))
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
    forward_kernel[(len(tiles) * heads,)](
        _matrix(q, ROWS.value), _matrix(k, step), _matrix(v, step), visible_until, out, lse, tiles, runs,
        *out.stride()[:2], lse.stride(0), scale,
        HEADS=heads, GROUP=heads // key_heads, D=head_width, **options(head_width, rows, step),
    )  # fmt: skip
    return out, lse


def options(head_width: int, rows: int, step: int) -> dict[str, int]:
    """Constants and options of a launch: up to four tiles of keys and of values, as many as fit into shared memory."""
    groups = rows // ROWS.value
    chosen = {"GROUPS": groups, "STEP": step, "STAGES": 4 if step * head_width <= 8192 else 2, "num_warps": 4}
    return chosen if groups == 2 else chosen | {"maxnreg": TWO_BLOCKS}


def _matrix(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of [T, H, D] as [T, H * D], in blocks of `rows` rows of one head."""
    if x.stride(1) != x.shape[2] or x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16:
        x = x.contiguous()
    flat = x.as_strided((x.shape[0], x.shape[1] * x.shape[2]), (x.stride(0), 1))
    block = [rows, x.shape[2]]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(flat, block, gl.NVMMASharedLayout.get_default_for(block, dtype))
