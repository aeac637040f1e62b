"""The ahead-of-time gate: compilations, and figures read from real binaries."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton has no build for this platform", allow_module_level=True)

import triton
import triton.language as tl
from aot_samples import IMPOSSIBLE, PRODUCT, SIGNATURE, changed, impossible, product

from bench.aot.compilation import TARGETS, Requirements, _without_comments, launches
from bench.aot.compiler import results
from bench.aot.verdict import failures

EVERYWHERE = ("product", "too large", "atomic")
ONLY_ON_SM_90 = ("one warp", "unaligned", "impossible", "abort")
SAMPLES, FOLDER = "aot_samples", str(Path(__file__).parents[1] / "support")


@pytest.fixture(scope="module")
def figures() -> dict[tuple[str, str], Any]:
    """Figures of the samples, from the installed release of triton."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", FOLDER)
        patch.setenv("TRITON_INTERPRET", "1")  # the compiling processes must drop it
        tasks = [(name, target) for name in EVERYWHERE for target in TARGETS] + [(name, "sm_90") for name in ONLY_ON_SM_90]
        done = results(tasks, {"product": PRODUCT.fingerprint()}, folder=None, entries=SAMPLES, processes=2)
        return {(name, target): row for name, target, row in done}


@pytest.mark.parametrize(("target", "kind"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCMMA"), ("gfx942", "MFMA")])
def test_product_compiles_for_every_target_with_plausible_figures(figures: Any, target: str, kind: str) -> None:
    row = figures["product", target]
    assert row["instructions"][kind] > 0
    assert row["instructions"]["transcendentals" if target == "gfx942" else "MUFU"] >= 128 * 128 // (4 * 64)
    assert 32 < row["registers"] <= 255 and row["warps"] == 4 and row["blocks"] >= 1
    assert row["spill_bytes"] == row["local_bytes"] == 0
    assert row["shared_bytes"] >= 128 * 64 * 2
    assert ("tensor_memory_columns" in row) == (target == "sm_100")
    assert failures(PRODUCT, triton.__version__, target, row) == []


def test_product_on_sm_90_uses_warpgroup_instructions_only(figures: Any) -> None:
    assert "HMMA" not in figures["product", "sm_90"]["instructions"]
    # one warp can't issue a warpgroup's product
    assert "HGMMA" not in figures["one warp", "sm_90"]["instructions"]
    found = failures(PRODUCT, "", "sm_90", figures["one warp", "sm_90"])
    assert any("no HGMMA" in line for line in found) and any("the slower form" in line for line in found)


def test_failures_of_a_spilling_kernel_name_the_spills(figures: Any) -> None:
    row = figures["one warp", "sm_90"]  # 128 x 128 sums in 32 threads
    assert row["registers"] == 255 and row["spill_bytes"] > 0 and row["local_bytes"] > 0
    found = failures(PRODUCT, "", "sm_90", row)
    assert any(line.startswith("spills") for line in found)
    assert "uses 8 bytes of local memory" in failures(PRODUCT, "", "sm_90", changed(local_bytes=8))  # no spill: an array
    allowed = replace(PRODUCT, requires=Requirements(spill_bytes={"sm_90": row["spill_bytes"]}))
    assert failures(allowed, "", "sm_90", row) == []


def test_failures_of_a_kernel_too_large_say_it_cannot_be_launched(figures: Any) -> None:
    for target in TARGETS:
        row = figures["too large", target]
        found = failures(PRODUCT, "", target, row)
        assert row["shared_bytes"] > 64 * 1024 and any("cannot be launched" in line for line in found), target


def test_failures_of_an_atomic_kernel_name_the_atomics(figures: Any) -> None:
    for target in TARGETS:
        row = figures["atomic", target]
        assert row["instructions"]["atomics"] > 0
        assert [line for line in failures(PRODUCT, "", target, row) if "atomics" in line]
        assert "atomics" not in figures["product", target]["instructions"]


def test_unaligned_product_takes_more_registers(figures: Any) -> None:
    assert figures["unaligned", "sm_90"]["registers"] > figures["product", "sm_90"]["registers"]


def test_impossible_entry_gives_the_reason_in_one_line(figures: Any) -> None:
    row = figures["impossible", "sm_90"]
    assert row.keys() == {"error"} and "one row only" in row["error"] and "\n" not in row["error"]
    assert failures(IMPOSSIBLE, "3.6.0", "sm_90", row) == [f"does not compile: {row['error']}"]
    for where in ("sm_90", "3.6.0 sm_90"):
        declared = replace(IMPOSSIBLE, requires=Requirements(impossible={where: "two rows"}))
        assert failures(declared, "3.6.0", "sm_90", row) == []
    elsewhere = replace(IMPOSSIBLE, requires=Requirements(impossible={"sm_80": "two rows", "3.9.0 sm_90": "two rows"}))
    assert failures(elsewhere, "3.6.0", "sm_90", row) != []


def test_compiler_that_dies_leaves_other_entries_alone(figures: Any) -> None:
    assert "died" in figures["abort", "sm_90"]["error"]
    assert len(figures) == len(EVERYWHERE) * len(TARGETS) + len(ONLY_ON_SM_90)


def test_results_with_changed_sources_exit(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", FOLDER)
    with pytest.raises(SystemExit):
        list(results([("product", "sm_90")], {"product": "another"}, folder=None, entries=SAMPLES, processes=1))
    assert "error: product changed" in capfd.readouterr().err


def test_source_with_missing_or_doubled_arguments_raises() -> None:
    for wrong in (replace(PRODUCT, signature={}), replace(PRODUCT, constants={**PRODUCT.constants, "rows": 1})):
        with pytest.raises(ValueError, match="must share out the arguments"):
            wrong.source()


def launch(rows: int = 128, stride: int = 64, dtype: torch.dtype = torch.bfloat16) -> None:
    a, b, out = (torch.empty(128, stride, dtype=dtype, device="meta") for _ in range(3))
    for _ in range(2):
        product[(1,)](a, b[:, 8:], out[:, 1:], stride, rows, 128, DEPTH=64, ATOMIC=False, num_warps=8)
    impossible[(1,)](out, 1, ROWS=rows)


def test_launches_are_specialised_by_the_rules_of_triton() -> None:
    needs = Requirements(tensor_cores=True)
    first, second = launches("sample", launch, by_kernel={"product": needs}, targets=["sm_90"])
    assert first.targets == second.targets == ("sm_90",)
    assert (first.name, first.requires) == ("sample: product", needs)
    assert first.signature == SIGNATURE and first.constants == PRODUCT.constants and first.options == {"num_warps": 8}
    assert first.aligned == {"a", "b", "stride", "rows"}
    assert (second.name, second.requires) == ("sample: impossible", Requirements())
    assert (second.signature, second.constants, second.options) == ({"out": "*bf16", "length": "i32"}, {"ROWS": 128}, {})
    first, _ = launches("sample", launch, 1, 72, torch.float16)
    assert first.signature == {"a": "*fp16", "b": "*fp16", "out": "*fp16", "stride": "i32"}
    assert first.constants == {**PRODUCT.constants, "rows": 1} and first.aligned == {"a", "b"}


def test_launches_of_one_kernel_twice_are_numbered() -> None:
    def twice() -> None:
        launch()
        launch(stride=72)

    names = [compilation.name for compilation in launches("sample", twice)]
    assert names == ["sample: product", "sample: impossible", "sample: product 2"]


def test_fingerprint_changes_with_all_that_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    before = PRODUCT.fingerprint()
    others = (
        replace(PRODUCT, options={"num_warps": 8, "num_stages": 2}),
        replace(PRODUCT, signature={**SIGNATURE, "a": "*fp16"}),
        replace(PRODUCT, constants={**PRODUCT.constants, "ROWS": 64}),
        replace(PRODUCT, aligned=frozenset({"rows"})),
        replace(PRODUCT, kernel=impossible),
    )
    assert len({before, *(entry.fingerprint() for entry in others)}) == len(others) + 1
    assert replace(PRODUCT, name="another", requires=Requirements()).fingerprint() == before
    monkeypatch.setitem(product.fn.__globals__, "scaled", impossible)  # what it calls
    called = PRODUCT.fingerprint()
    monkeypatch.undo()
    monkeypatch.setitem(product.fn.__globals__, "SCALE", tl.constexpr(3.0))  # a constant of what it calls
    assert len({before, called, PRODUCT.fingerprint()}) == 3


def test_sources_that_differ_in_comments_are_equal() -> None:
    assert _without_comments("    x = 1  # one\n    # two\n    y = 2\n") == _without_comments("    x = 1\n    y = 2\n")
    assert _without_comments("x = 1\n") != _without_comments("x = 2\n")
