"""Two kernels for the tests of integers of 1: one calls a method of its parameter, which an integer of 1 does not have."""

from collections.abc import Iterator

import triton
import triton.language as tl

from bench.aot.compilation import Compilation


@triton.jit(do_not_specialize=["kept"])
def method_kernel(out, count, kept):
    tl.store(out, count.to(tl.int64) * kept)


@triton.jit(do_not_specialize=["kept"])
def cast_kernel(out, count, kept):
    tl.store(out, tl.cast(count, tl.int64) * kept)


INTEGERS = {"out": "*i64", "count": "i32", "kept": "i32"}


def compilations() -> Iterator[Compilation]:
    """Both, in a process of their own: this module stands where bench.compilations does."""
    for name, kernel in (("method", method_kernel), ("cast", cast_kernel)):
        yield Compilation(name, kernel, INTEGERS, {}, frozenset({"out", "kept"}), {})
