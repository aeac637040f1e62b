"""Records, tables and pictures: drawn from the JSON alone, old files included."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import plot, readme
from bench.records import RESULTS, load, title
from bench.registry import BENCHMARKS

CASE: dict[str, Any] = {
    "shape": {"size": 100, "model": {"width": 8}},
    "unit": "numbers",
    "work": 100,
    "statistics": {},
    "flops": 1e6,
    "bytes": 0.0,
    "roofline": {"flops": 1e11, "bytes": 1e10},
    "check": {"right": True, "errors": {}},
    "left_out": {},
    "seconds": {"ours": [1e-3, 2e-3, 3e-3], "ours, again": [1e-3, 2e-3, 3e-3], "plain": [4e-3, 6e-3, 8e-3]},
    "speed_up": {"ours, again": [1.0, 1.0, 1.0], "plain": [2.0, 3.0, 4.0]},
    "memory": {"ours": None, "ours, again": None, "plain": None},
}
WRONG = {key: CASE[key] for key in ("shape", "unit", "work", "statistics", "flops", "bytes", "roofline")} | {
    "check": {"right": False, "errors": {}}
}


def record(name: str, *cases: dict[str, Any]) -> dict[str, Any]:
    return {"operation": name, "environment": {"device": "a device"}, "cases": list(cases)}


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "a-device" / f"{values['operation']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def test_load_of_an_old_record_renames_its_keys(tmp_path: Path) -> None:
    old = {**CASE, "shape": {"stream": "32 to 224"}, "facts": {"a": 1.0}, "limits": CASE["roofline"]}
    del old["statistics"], old["roofline"]
    (case,) = load(write(tmp_path, record("attention", old)))["cases"]
    assert case == {**CASE, "shape": {"lengths": "32 to 224"}, "statistics": {"a": 1.0}}


def test_load_of_every_committed_record_gives_cases_of_today() -> None:
    paths = sorted(RESULTS.glob("*/*.json"))
    assert paths
    for path in paths:
        for case in load(path)["cases"]:
            assert case.keys() >= CASE.keys() and "stream" not in title(case), path


def test_kernel_table_shows_the_fastest_third_party_backend_and_leaves_wrong_cases_out(tmp_path: Path) -> None:
    write(tmp_path, record("loss", CASE, WRONG))
    assert readme.kernel_table(tmp_path).splitlines()[2:] == [
        "| a device | loss | size 100 | 5e+04 numbers/s | plain | 3.00 (2.00 to 4.00) |",
        "| any GPU | all | | not measured | | |",
    ]


def test_data_table_shows_every_peer_library(tmp_path: Path) -> None:
    write(tmp_path, record("pairs", CASE))
    assert readme.data_table(tmp_path).splitlines()[2:] == ["| a device | pairs | size 100 | 5e+04 numbers/s | plain 3.00 |"]


def test_step_table_shows_every_other_way_and_the_counted_work(tmp_path: Path) -> None:
    assert readme.step_table(tmp_path).splitlines()[2:] == ["| any | all | not measured | | |"]
    write(tmp_path, record("steps", CASE | {"statistics": {"counted speed-up": 1.5}}, WRONG))
    assert readme.step_table(tmp_path).splitlines()[2:] == [
        "| a device | size 100 | 5e+04 numbers/s | again 1.00 (1.00 to 1.00); plain 3.00 (2.00 to 4.00) | 1.50 |"
    ]


def test_page_lists_every_benchmark() -> None:
    page = (Path(readme.__file__).parent / "README.md").read_text()
    assert [name for name in BENCHMARKS if f"\n| {name} | " not in page] == []


def test_between_with_a_missing_mark_raises() -> None:
    with pytest.raises(ValueError, match="the page lacks the marks"):
        readme._between("no marks", readme.TABLES[0].marks, "table")


def test_plot_of_a_record_writes_both_pictures_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results").mkdir()
    write(tmp_path / "results", record("loss", CASE, WRONG))
    write(tmp_path / "results", record("small", WRONG))
    monkeypatch.setattr("sys.argv", ["plot", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "plots")])
    plot.main()
    pictures = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.svg"))
    assert pictures == ["plots/a-device/loss-roofline.svg", "plots/a-device/loss-speed-up.svg"]
