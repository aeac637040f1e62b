"""Small kernels for the tests of the ahead-of-time gate; stands where `bench.compilations` does, for compilers and tests."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from bench.aot.compilation import Compilation, Requirements

SCALE = tl.constexpr(2.0)


@triton.jit
def scaled(x):
    return x * SCALE


@triton.jit
def product(a, b, out, stride, rows, ROWS: tl.constexpr, DEPTH: tl.constexpr, ATOMIC: tl.constexpr):
    """Compute out [ROWS, ROWS] = 2 exp2(a [ROWS, DEPTH] b [DEPTH, ROWS])."""
    row, depth = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    inside = row[:, None] < rows
    x = tl.load(a + row[:, None] * stride + depth[None, :], mask=inside, other=0.0)
    y = tl.load(b + depth[:, None] * stride + row[None, :])
    z = scaled(tl.exp2(tl.dot(x, y))).to(out.dtype.element_ty)
    tile = out + row[:, None] * stride + row[None, :]
    if ATOMIC:
        tl.atomic_add(tile, z, mask=inside)
    else:
        tl.store(tile, z, mask=inside)


@triton.jit(do_not_specialize=["length"])
def impossible(out, length, ROWS: tl.constexpr):
    tl.static_assert(ROWS == 1, "one row only")
    tl.store(out, 0.0)


class Abort:
    """Takes the process down as a failed assertion inside the compiler does."""

    @property
    def arg_names(self) -> list[str]:
        os.abort()


SIGNATURE = {"a": "*bf16", "b": "*bf16", "out": "*bf16", "stride": "i32", "rows": "i32"}
PRODUCT = Compilation(
    name="product",
    kernel=product,
    signature=SIGNATURE,
    constants={"ROWS": 128, "DEPTH": 64, "ATOMIC": False},
    aligned=frozenset({"a", "b", "out", "stride"}),
    options={"num_warps": 4, "num_stages": 2},
    requires=Requirements(tensor_cores=True),
)
IMPOSSIBLE = Compilation("impossible", impossible, {"out": "*fp32", "length": "i32"}, {"ROWS": 2}, frozenset(), {})


def compilations() -> Iterator[Compilation]:
    """What the tests compile, in processes of their own: this module stands where bench.compilations does."""
    yield PRODUCT
    yield replace(PRODUCT, name="one warp", options={"num_warps": 1})
    yield replace(PRODUCT, name="unaligned", aligned=frozenset({"b", "out"}))
    yield replace(PRODUCT, name="too large", constants={"ROWS": 128, "DEPTH": 512, "ATOMIC": False}, options={"num_warps": 8})
    atomic = {**SIGNATURE, "out": "*fp32"}
    yield replace(PRODUCT, name="atomic", signature=atomic, constants={"ROWS": 64, "DEPTH": 64, "ATOMIC": True})
    yield IMPOSSIBLE
    yield replace(IMPOSSIBLE, name="abort", kernel=Abort())


ROW: dict[str, Any] = {
    "registers": 128,
    "spill_bytes": 0,
    "local_bytes": 0,
    "shared_bytes": 65536,
    "warps": 8,
    "blocks": 2,
    "instructions": {"HGMMA": 8, "UTMALDG": 2, "BAR": 3},
}


def changed(**figures: Any) -> dict[str, Any]:
    instructions = {**ROW["instructions"], **figures.pop("instructions", {})}
    return {**ROW, **figures, "instructions": {kind: count for kind, count in instructions.items() if count}}
