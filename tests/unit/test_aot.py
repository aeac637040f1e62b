"""The ahead-of-time gate: figures read from real binaries, verdicts on them, and the committed table."""

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton has no build for this platform", allow_module_level=True)

import triton
import triton.language as tl

import bench.compilations
from bench.aot import __main__ as gate
from bench.aot import table
from bench.aot.binary import OPCODE, access_bytes, amd_figures, usage_of
from bench.aot.compilation import TARGETS, Compilation, Requirements, _without_comments, launches
from bench.aot.compiler import listed, results
from bench.aot.occupancy import blocks_per_multiprocessor
from bench.aot.verdict import differences, failures

SCALE = tl.constexpr(2.0)


@triton.jit
def scaled(x):
    return x * SCALE


@triton.jit
def product(a, b, out, stride, rows, ROWS: tl.constexpr, DEPTH: tl.constexpr, ATOMIC: tl.constexpr):
    """out [ROWS, ROWS] = 2 exp2(a [ROWS, DEPTH] b [DEPTH, ROWS])."""
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


EVERYWHERE = ("product", "too large", "atomic")
ONLY_ON_SM_90 = ("one warp", "unaligned", "impossible", "abort")
HERE = Path(__file__)


@pytest.fixture(scope="module")
def figures() -> dict[tuple[str, str], Any]:
    """Figures of the samples, from the installed release of triton."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE.parent))
        patch.setenv("TRITON_INTERPRET", "1")  # the compiling processes must drop it
        tasks = [(name, target) for name in EVERYWHERE for target in TARGETS] + [(name, "sm_90") for name in ONLY_ON_SM_90]
        done = results(tasks, {"product": PRODUCT.fingerprint()}, folder=None, entries=HERE.stem, processes=2)
        return {(name, target): row for name, target, row in done}


@pytest.mark.parametrize(("target", "kind"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCMMA"), ("gfx942", "MFMA")])
def test_a_sample_compiles_for_every_target_and_its_figures_are_read(figures: Any, target: str, kind: str) -> None:
    row = figures["product", target]
    assert row["instructions"][kind] > 0
    assert row["instructions"]["transcendentals" if target == "gfx942" else "MUFU"] >= 128 * 128 // (4 * 64)
    assert 32 < row["registers"] <= 255 and row["warps"] == 4 and row["blocks"] >= 1
    assert row["spill_bytes"] == row["local_bytes"] == 0
    assert row["shared_bytes"] >= 128 * 64 * 2
    assert ("tensor_memory_columns" in row) == (target == "sm_100")
    assert failures(PRODUCT, triton.__version__, target, row) == []


def test_on_sm_90_the_product_is_of_warpgroups_alone(figures: Any) -> None:
    assert "HMMA" not in figures["product", "sm_90"]["instructions"]
    # one warp can't issue a warpgroup's product
    assert "HGMMA" not in figures["one warp", "sm_90"]["instructions"]
    found = failures(PRODUCT, "", "sm_90", figures["one warp", "sm_90"])
    assert any("no HGMMA" in line for line in found) and any("the slower form" in line for line in found)


def test_spills_are_seen(figures: Any) -> None:
    row = figures["one warp", "sm_90"]  # 128 x 128 sums in 32 threads
    assert row["registers"] == 255 and row["spill_bytes"] > 0 and row["local_bytes"] > 0
    found = failures(PRODUCT, "", "sm_90", row)
    assert any(line.startswith("spills") for line in found)
    assert "uses 8 bytes of local memory" in failures(PRODUCT, "", "sm_90", changed(local_bytes=8))  # no spill: an array
    allowed = replace(PRODUCT, requires=Requirements(spill_bytes={"sm_90": row["spill_bytes"]}))
    assert failures(allowed, "", "sm_90", row) == []


def test_what_does_not_fit_cannot_be_launched(figures: Any) -> None:
    for target in TARGETS:
        row = figures["too large", target]
        found = failures(PRODUCT, "", target, row)
        assert row["shared_bytes"] > 64 * 1024 and any("cannot be launched" in line for line in found), target


def test_atomics_are_seen(figures: Any) -> None:
    for target in TARGETS:
        row = figures["atomic", target]
        assert row["instructions"]["atomics"] > 0
        assert [line for line in failures(PRODUCT, "", target, row) if "atomics" in line]
        assert "atomics" not in figures["product", target]["instructions"]


def test_alignment_reaches_the_compiler(figures: Any) -> None:
    assert figures["unaligned", "sm_90"]["registers"] > figures["product", "sm_90"]["registers"]


def test_an_entry_that_cannot_compile_says_why_in_one_line(figures: Any) -> None:
    row = figures["impossible", "sm_90"]
    assert row.keys() == {"error"} and "one row only" in row["error"] and "\n" not in row["error"]
    assert failures(IMPOSSIBLE, "3.6.0", "sm_90", row) == [f"does not compile: {row['error']}"]
    for where in ("sm_90", "3.6.0 sm_90"):
        declared = replace(IMPOSSIBLE, requires=Requirements(impossible={where: "two rows"}))
        assert failures(declared, "3.6.0", "sm_90", row) == []
    elsewhere = replace(IMPOSSIBLE, requires=Requirements(impossible={"sm_80": "two rows", "3.9.0 sm_90": "two rows"}))
    assert failures(elsewhere, "3.6.0", "sm_90", row) != []


def test_a_compiler_that_dies_takes_nothing_else_with_it(figures: Any) -> None:
    assert "died" in figures["abort", "sm_90"]["error"]
    assert len(figures) == len(EVERYWHERE) * len(TARGETS) + len(ONLY_ON_SM_90)


def test_sources_that_changed_on_the_way_are_refused(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    with pytest.raises(SystemExit):
        list(results([("product", "sm_90")], {"product": "another"}, folder=None, entries=HERE.stem, processes=1))
    assert "error: product changed" in capfd.readouterr().err


def test_arguments_must_be_shared_out() -> None:
    for wrong in (replace(PRODUCT, signature={}), replace(PRODUCT, constants={**PRODUCT.constants, "rows": 1})):
        with pytest.raises(ValueError, match="must share out the arguments"):
            wrong.source()


def launch(rows: int = 128, stride: int = 64, dtype: torch.dtype = torch.bfloat16) -> None:
    a, b, out = (torch.empty(128, stride, dtype=dtype, device="meta") for _ in range(3))
    for _ in range(2):
        product[(1,)](a, b[:, 8:], out[:, 1:], stride, rows, 128, DEPTH=64, ATOMIC=False, num_warps=8)
    impossible[(1,)](out, 1, ROWS=rows)


def test_a_launch_is_specialised_as_triton_specialises_it() -> None:
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


def test_different_launches_of_one_kernel_are_numbered() -> None:
    def twice() -> None:
        launch()
        launch(stride=72)

    names = [compilation.name for compilation in launches("sample", twice)]
    assert names == ["sample: product", "sample: impossible", "sample: product 2"]


def test_opcodes_and_widths_are_read_from_a_disassembly() -> None:
    code = """
    .L_x_1:
        /*1a40*/              @!P0 STL.128 [R1+0x8], R4 ;
        /*1a50*/                   LDL.LU R2, [R1] ;
        /*1a60*/             @!UPT UTMALDG.2D [UR8], [UR4], desc[URZ] ;
        /*1a70*/              @P1  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspB, R24 ;
                                   LDL.64 R2, [R1+0x10] ;
        /* 0x000fe200078e00ff */
    """
    opcodes = OPCODE.findall(code)
    assert [name for name, _ in opcodes] == ["STL", "LDL", "UTMALDG", "HGMMA", "LDL"]
    assert [access_bytes(suffixes) for name, suffixes in opcodes if name in ("STL", "LDL")] == [16, 4, 8]
    assert access_bytes(".U8") == 1 and access_bytes("") == 4


def test_a_report_of_the_disassembler_that_says_nothing_is_refused() -> None:
    assert usage_of(" Function f:\n  REG:174 STACK:8 LOCAL:0 CONSTANT[0]:424\n")["STACK"] == 8
    with pytest.raises(ValueError, match="no resource usage"):
        usage_of("Resource usage:\n")


def test_amd_figures_are_those_of_the_metadata() -> None:
    text = """
\tv_mfma_f32_32x32x8_bf16 a
\tglobal_atomic_add_f32 v
  - .agpr_count:     4
    .group_segment_fixed_size: 256
    .private_segment_fixed_size: 12
    .sgpr_count:     62
    .sgpr_spill_count: 3
    .vgpr_count:     126
    .vgpr_spill_count: 2
"""

    class Metadata:
        shared, num_warps = 1024, 8

    assert amd_figures("gfx942", text, Metadata) == {
        "registers": 126,
        "spill_bytes": 8,
        "local_bytes": 12,
        "shared_bytes": 1280,
        "warps": 8,
        "blocks": 2,
        "instructions": {"MFMA": 1, "atomics": 1},
        "scalar_registers": 62,
        "scalar_spills": 3,
    }


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "columns", "expected"),
    [
        ("sm_90", 4, 128, 0, 0, 4),  # 65,536 registers
        ("sm_90", 4, 129, 0, 0, 3),  # come in eights
        ("sm_90", 8, 255, 0, 0, 1),
        ("sm_90", 12, 168, 200 * 1024, 0, 1),
        ("sm_90", 4, 16, 0, 0, 16),  # 2,048 threads
        ("sm_90", 1, 16, 0, 0, 32),  # 32 blocks
        ("sm_90", 4, 64, 113 * 1024, 0, 2),  # a kibibyte a block is the system's
        ("sm_90", 4, 64, 113 * 1024 + 1, 0, 1),
        ("sm_90", 4, 64, 227 * 1024, 0, 1),
        ("sm_90", 4, 64, 227 * 1024 + 1, 0, 0),
        ("sm_80", 4, 64, 163 * 1024, 0, 1),
        ("sm_80", 4, 64, 163 * 1024 + 1, 0, 0),
        ("sm_90", 32, 128, 0, 0, 0),  # 1,024 threads of 128 registers are twice too many
        ("sm_100", 4, 64, 1024, 256, 2),
        ("gfx942", 4, 128, 0, 0, 4),
        ("gfx942", 4, 512, 32 * 1024, 0, 1),
        ("gfx942", 4, 64, 32 * 1024, 0, 2),
        ("gfx942", 4, 64, 64 * 1024 + 1, 0, 0),
    ],
)
def test_blocks_on_a_multiprocessor(target: str, warps: int, registers: int, shared: int, columns: int, expected: int) -> None:
    fits = blocks_per_multiprocessor(
        target, warps=warps, registers=registers, shared_bytes=shared, tensor_memory_columns=columns
    )
    assert fits == expected


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


@pytest.mark.parametrize(
    ("after", "line"),
    [
        (changed(spill_bytes=16), "spill bytes 0 -> 16"),
        (changed(local_bytes=8), "local bytes 0 -> 8"),
        (changed(registers=168, blocks=1), "blocks 2 -> 1"),
        (changed(shared_bytes=240_000, blocks=0), "blocks 2 -> 0"),
        (changed(instructions={"HGMMA": 0, "HMMA": 64}), "HGMMA 8 -> 0"),
        (changed(instructions={"UTMALDG": 0}), "UTMALDG 2 -> 0"),
        (changed(instructions={"atomics": 1}), "atomics 0 -> 1"),
        ({"error": "out of everything"}, "compiles -> does not compile (out of everything)"),
    ],
)
def test_each_regression_is_told_with_both_figures(after: dict[str, Any], line: str) -> None:
    assert line in differences(ROW, after)[0]
    assert line not in differences(ROW, after)[1]
    assert differences(after, ROW)[0] == ([] if "HMMA" not in after.get("instructions", {}) else ["HMMA 64 -> 0"])


@pytest.mark.parametrize(
    "after", [changed(registers=140), changed(shared_bytes=70_000), changed(instructions={"BAR": 9}), changed(blocks=3)]
)
def test_other_changes_are_no_regressions(after: dict[str, Any]) -> None:
    worse, other = differences(ROW, after)
    assert not worse and len(other) == 1
    assert differences(ROW, dict(ROW)) == ([], [])


def test_promised_instructions_must_be_there() -> None:
    entry = replace(PRODUCT, requires=Requirements(instructions={"sm_90": ("UTMALDG", "USETMAXREG")}))
    assert failures(entry, "", "sm_90", ROW) == ["has no USETMAXREG, which the entry promises"]
    assert failures(entry, "", "sm_80", ROW) == []


def test_fingerprints_follow_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_comments_do_not_count() -> None:
    assert _without_comments("    x = 1  # one\n    # two\n    y = 2\n") == _without_comments("    x = 1\n    y = 2\n")
    assert _without_comments("x = 1\n") != _without_comments("x = 2\n")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command, with compilers that return what is set, and the table at a temporary path."""
    rows = {("product", target): changed(instructions={"HMMA": 64, "HGMMA": 8, "MFMA": 8}) for target in TARGETS}
    rows["product", "sm_90"] = changed()

    def compiled(tasks: list[tuple[str, str]], *_: Any, **__: Any) -> Iterator[tuple[str, str, Any]]:
        yield from ((name, target, rows[name, target]) for name, target in tasks)

    monkeypatch.setattr(gate, "results", compiled)
    monkeypatch.setattr(gate, "releases", lambda: {"3.9.0": None, "3.6.0": tmp_path})
    monkeypatch.setattr(gate, "listed", lambda _: {"product": PRODUCT})
    path = tmp_path / "aot.json"

    def run(*arguments: str) -> int:
        return gate.main(["--table", str(path), *arguments])

    run.rows, run.path = rows, path  # type: ignore[attr-defined]
    return run


def test_the_command_compares_fails_and_updates(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0 and not run.path.exists()
    assert "8 binaries are not in the table, 0 of the table are no more" in capsys.readouterr().out
    assert run("--update") == 0
    written = run.path.read_text()
    assert json.loads(written)["figures"]["3.6.0"]["product"]["sm_90"] == ROW
    lines = [line for line in written.splitlines() if "sm_90" in line]
    assert len(lines) == 2 and all("UTMALDG" in line for line in lines)  # a binary is a line

    run.rows["product", "sm_90"] = changed(registers=168, blocks=1)
    assert run() == 1 and run.path.read_text() == written
    output = capsys.readouterr().out
    assert "REGRESSION: product, sm_90, triton 3.6.0: blocks 2 -> 1" in output
    assert "change: product, sm_90, triton 3.9.0: registers 128 -> 168" in output
    assert run("--target", "sm_80") == 0 and run("--release", "3.6.0") == 1 and run("--only", "prod*") == 1

    assert run("--update") == 0 and run.path.read_text() != written
    assert run() == 0


def test_a_failure_is_never_written(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.rows["product", "sm_90"] = changed(instructions={"HGMMA": 0})
    assert run("--update") == 1 and not run.path.exists()
    assert "FAILURE: product, sm_90, triton 3.9.0: has no HGMMA" in capsys.readouterr().out


def test_an_entry_is_compiled_for_its_own_targets_alone(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run("--update")
    monkeypatch.setattr(gate, "listed", lambda _: {"product": replace(PRODUCT, targets=("sm_90",))})
    assert run() == 0
    assert "0 binaries are not in the table, 6 of the table are no more" in capsys.readouterr().out
    assert run("--update") == 0
    assert {target for _, _, target in table.read(run.path)[1]} == {"sm_90"}


def test_mistakes_are_told_in_one_line(run: Any) -> None:
    for arguments in (["--only", "nothing"], ["--release", "2.0"]):
        with pytest.raises(SystemExit, match=r"^error: "):
            run(*arguments)
    with pytest.raises(SystemExit):
        run("--update", "--only", "product")


def test_a_table_out_of_date_is_told(run: Any, tmp_path: Path) -> None:
    assert table.out_of_date(run.path, {"product": PRODUCT}) == ["product: not in the table"]
    run("--update")
    assert table.out_of_date(run.path, {"product": PRODUCT}) == []
    assert table.out_of_date(run.path, {"product": replace(PRODUCT, options={})}) == ["product: changed since"]
    assert table.out_of_date(run.path, {}) == ["product: in the table, but no entry"]
    table_of_one = run.path.with_name("one.json")
    table.write(table_of_one, {"product": PRODUCT.fingerprint()}, {("3.9.0", "product", "sm_90"): ROW})
    assert table.out_of_date(table_of_one, {"product": replace(PRODUCT, targets=("sm_90",))}) == []
    stricter = replace(PRODUCT, requires=Requirements(instructions={"sm_90": ("USETMAXREG",)}))
    assert len(table.out_of_date(run.path, {"product": stricter})) == 2  # in each release
    fingerprints, rows = table.read(run.path)
    del rows["3.6.0", "product", "sm_80"]
    table.write(run.path, fingerprints, rows)
    assert table.out_of_date(run.path, {"product": PRODUCT}) == ["product, sm_80, triton 3.6.0: no figures"]


def test_no_two_entries_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.compilations, "compilations", lambda: iter([PRODUCT, PRODUCT]))
    with pytest.raises(ValueError, match="two compilations are named"):
        listed("bench.compilations")


def test_the_committed_table_speaks_of_the_kernels_as_they_are() -> None:
    stale = table.out_of_date(table.PATH, listed("bench.compilations"))
    assert not stale, "run `make aot`, then `python -m bench.aot --update`:\n" + "\n".join(stale)
