"""The ahead-of-time gate: kernels whose integer arguments are 1 or no multiple of 16."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton has no build for this platform", allow_module_level=True)

import triton
import triton.language as tl
from aot_samples import PRODUCT, product
from triton.runtime.jit import JITFunction

from bench.aot.compilation import Compilation
from bench.aot.integers import single_ones, specialised, translate, unusual_integers


def count_kernel(out, count, kept, METHOD: tl.constexpr):
    if METHOD:
        tl.store(out, count.to(tl.int64) * kept)
    else:
        tl.store(out, tl.cast(count, tl.int64) * kept)


KERNEL = JITFunction(count_kernel, do_not_specialize=["kept"])
INTEGERS = {"out": "*i64", "count": "i32", "kept": "i32"}
COUNT = Compilation("count", KERNEL, INTEGERS, {"METHOD": False}, frozenset({"out", "kept"}), {})


def test_unusual_integers_of_a_kernel_are_those_of_its_signature() -> None:
    compiled = replace(PRODUCT, kernel=JITFunction(product.fn))  # where the interpreter stands in its place
    plain = replace(compiled, name="plain", targets=("sm_80", "gfx942"))
    constants = {**PRODUCT.constants, "ATOMIC": True}
    fuller = replace(compiled, name="fuller", constants=constants, targets=("sm_80", "sm_90"))
    ones, odd = unusual_integers([plain, fuller])
    assert (ones.name, odd.name) == ("fuller, integers of 1", "fuller, odd integers")
    assert ones.targets == odd.targets == ("sm_80", "sm_90")
    assert ones.constants == {**fuller.constants, "stride": 1, "rows": 1}
    assert set(ones.signature) == {"a", "b", "out"} == ones.aligned
    assert (odd.signature, odd.constants, odd.aligned) == (fuller.signature, fuller.constants, {"a", "b", "out"})


def test_unusual_integers_leave_out_what_a_kernel_does_not_specialise() -> None:
    assert specialised(COUNT) == ("count",)
    ones, odd = unusual_integers([COUNT])
    assert ones.constants == {"METHOD": False, "count": 1} and ones.signature == {"out": "*i64", "kept": "i32"}
    assert odd.aligned == {"out"}
    assert [it.name for it in single_ones([COUNT, COUNT])] == ["count, count = 1"]


def test_translation_of_a_parameter_of_1_fails_where_its_method_is_called() -> None:
    translate(COUNT)
    (one,) = single_ones([COUNT])
    translate(one)
    translate(replace(COUNT, constants={"METHOD": True}))
    with pytest.raises(triton.CompilationError, match="has no attribute"):
        translate(replace(one, constants={**one.constants, "METHOD": True}))


@pytest.mark.slow
def test_every_form_of_every_kernel_translates_with_each_integer_alone_as_1() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.aot.integers"]
    subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parents[2])
