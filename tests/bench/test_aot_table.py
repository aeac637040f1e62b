"""The ahead-of-time gate: verdicts on figures, and the committed table."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton has no build for this platform", allow_module_level=True)

from aot_samples import PRODUCT, ROW, changed

import bench.compilations
from bench.aot import __main__ as gate
from bench.aot import table
from bench.aot.compilation import TARGETS, Requirements
from bench.aot.compiler import listed
from bench.aot.verdict import differences, failures


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
def test_differences_of_a_worse_binary_name_both_figures(after: dict[str, Any], line: str) -> None:
    assert line in differences(ROW, after)[0]
    assert line not in differences(ROW, after)[1]
    assert differences(after, ROW)[0] == ([] if "HMMA" not in after.get("instructions", {}) else ["HMMA 64 -> 0"])


@pytest.mark.parametrize(
    "after", [changed(registers=140), changed(shared_bytes=70_000), changed(instructions={"BAR": 9}), changed(blocks=3)]
)
def test_differences_of_other_figures_are_no_regressions(after: dict[str, Any]) -> None:
    worse, other = differences(ROW, after)
    assert not worse and len(other) == 1
    assert differences(ROW, dict(ROW)) == ([], [])


def test_failures_of_a_binary_without_promised_instructions_name_them() -> None:
    entry = replace(PRODUCT, requires=Requirements(instructions={"sm_90": ("UTMALDG", "USETMAXREG")}))
    assert failures(entry, "", "sm_90", ROW) == ["has no USETMAXREG, which the entry promises"]
    assert failures(entry, "", "sm_80", ROW) == []


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


def test_command_with_a_regression_fails_until_updated(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_command_with_changed_compiles_only_new_entries(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run("--update")
    before = table.read(run.path)[1]
    run.rows |= {("other", target): figures for (_, target), figures in list(run.rows.items())}
    run.rows["product", "sm_90"] = changed(registers=100)  # would show if it were compiled again
    monkeypatch.setattr(gate, "listed", lambda _: {"product": PRODUCT, "other": replace(PRODUCT, name="other", options={})})
    assert run("--changed", "--update") == 0
    after = table.read(run.path)[1]
    assert {key: after[key] for key in before} == before and {name for _, name, _ in after} == {"product", "other"}
    monkeypatch.setattr(gate, "listed", lambda _: {"product": replace(PRODUCT, options={"num_warps": 8})})
    assert run("--changed", "--update") == 0
    assert {figures["registers"] for key, figures in table.read(run.path)[1].items() if key[2] == "sm_90"} == {100}


def test_update_with_a_failure_writes_nothing(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.rows["product", "sm_90"] = changed(instructions={"HGMMA": 0})
    assert run("--update") == 1 and not run.path.exists()
    assert "FAILURE: product, sm_90, triton 3.9.0: has no HGMMA" in capsys.readouterr().out


def test_entry_with_one_target_is_compiled_for_it_only(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run("--update")
    monkeypatch.setattr(gate, "listed", lambda _: {"product": replace(PRODUCT, targets=("sm_90",))})
    assert run() == 0
    assert "0 binaries are not in the table, 6 of the table are no more" in capsys.readouterr().out
    assert run("--update") == 0
    assert {target for _, _, target in table.read(run.path)[1]} == {"sm_90"}


def test_command_with_a_mistake_exits_with_one_line(run: Any) -> None:
    for arguments in (["--only", "nothing"], ["--release", "2.0"]):
        with pytest.raises(SystemExit, match=r"^error: "):
            run(*arguments)
    with pytest.raises(SystemExit):
        run("--update", "--only", "product")


def test_out_of_date_names_each_stale_entry(run: Any, tmp_path: Path) -> None:
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


def test_listed_with_two_entries_of_one_name_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.compilations, "compilations", lambda: iter([PRODUCT, PRODUCT]))
    with pytest.raises(ValueError, match="two compilations are named"):
        listed("bench.compilations")


def test_committed_table_describes_the_kernels_of_today() -> None:
    stale = table.out_of_date(table.PATH, listed("bench.compilations"))
    assert not stale, "run `make aot`, then `python -m bench.aot --update`:\n" + "\n".join(stale)
