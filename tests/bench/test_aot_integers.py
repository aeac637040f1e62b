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

from aot_integer_samples import compilations
from aot_samples import PRODUCT, product
from triton.runtime.jit import JITFunction

from bench.aot.integers import single_ones, specialised, unusual_integers

ROOT = Path(__file__).parents[2]


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
    method, _ = compilations()
    count = replace(method, kernel=JITFunction(method.kernel.fn, do_not_specialize=["kept"]))
    assert specialised(count) == ("count",)
    ones, odd = unusual_integers([count])
    assert ones.constants == {"count": 1} and ones.signature == {"out": "*i64", "kept": "i32"}
    assert odd.aligned == {"out"}
    assert [it.name for it in single_ones([count, count])] == ["method, count = 1"]


def test_translation_of_a_parameter_of_1_fails_where_its_method_is_called() -> None:
    done = translated("aot_integer_samples")
    assert done.returncode == 1
    assert "FAILURE: method, count = 1: " in done.stdout and "attribute 'to'" in done.stdout
    assert "1 forms of kernels with one integer as 1 were translated, 1 failed" in done.stdout


@pytest.mark.slow
def test_every_form_of_every_kernel_translates_with_each_integer_alone_as_1() -> None:
    done = translated("bench.compilations")
    assert done.returncode == 0, done.stdout


def translated(entries: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process without the interpreter, which changes Triton's language."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests/support"), str(ROOT / "kernels"), str(ROOT)])
    command = [sys.executable, "-m", "bench.aot.integers", entries]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
