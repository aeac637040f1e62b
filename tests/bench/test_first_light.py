"""The first minutes on a GPU: every item ends with a line, whatever becomes of it, within the limits."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import conftest
import pytest
import torch

from bench import first_light, machine
from bench.first_light import GOAL_ATTENTION, GOAL_LOSS, ITEMS, PART_SECONDS, Item, command_of, lines
from bench.records import title
from bench.registry import BENCHMARKS, Benchmark
from bench.worker import Request, chosen

ROOT = Path(__file__).parents[2]
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "zstandard", "hnswlib", "tomli_w"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def dry_run(tmp_path: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Lines by item of a dry run in which no process can import the blocked packages."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])}
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench.first_light", "--dry-run", "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8 and sum(path.stat().st_size for path in files) < 16 << 20
    printed = [json.loads(line) for line in (out / "first-light.jsonl").read_text().splitlines()]
    assert all(line["seconds"] < line["limit"] + 5 for line in printed)
    assert all(f"{line['limit']:3.0f} s  {line['item']}\n" in done.stdout for line in printed)
    return {line["item"]: line for line in printed}


def assert_planted(line: dict[str, Any]) -> None:
    assert line["status"] == "timed out" and line["reason"] == "stopped after 1 seconds\nthis item hangs"


def test_dry_run_of_some_items_without_the_packages_says_what_is_missing(tmp_path: Path) -> None:
    line = dry_run(tmp_path, "--only", "ceilings", "--only", "training steps")
    assert list(line) == ["ceilings", "training steps", "planted failure"]
    assert line["ceilings"]["status"] == "done" and json.loads(line["ceilings"]["reason"])["roofline"]["flops"] > 0
    assert line["training steps"]["status"] == "failed"
    assert "training left out: No module named 'pydantic'" in line["training steps"]["reason"]
    assert_planted(line["planted failure"])


@pytest.mark.slow
def test_dry_run_without_the_packages_ends_every_item_with_its_line(tmp_path: Path) -> None:
    line = dry_run(tmp_path)
    assert list(line) == [*(item.name for item in ITEMS), "planted failure"]
    need = {item.name for item in ITEMS if item.part == 2}
    assert {name for name in line if line[name]["status"] == "done"} == {item.name for item in ITEMS} - need
    assert all("No module named" in line[name]["reason"] for name in need)
    assert_planted(line["planted failure"])
    for path in (tmp_path / "out").glob("*/*.json"):
        assert all(case["check"]["right"] and case["seconds"] for case in json.loads(path.read_text())["cases"]), path


@pytest.mark.parametrize("part", PART_SECONDS)
def test_limits_of_a_part_add_up_to_no_more_than_its_seconds_and_files(part: int) -> None:
    items = [item for item in ITEMS if item.part == part]
    assert sum(item.seconds for item in items) <= PART_SECONDS[part]
    assert 2 + sum(item.command[:2] in (("-m", "bench"), ("-m", "bench.tune")) for item in items) <= 8


@pytest.mark.parametrize(
    ("item", "titles"), [("attention", [GOAL_ATTENTION] * 12), ("loss", [GOAL_LOSS]), ("training steps", ["gpus 1"])]
)
def test_cases_of_an_item_are_those_that_a_gpu_has(item: str, titles: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "device", lambda: torch.device("cpu"))
    _, _, name, *options = next(it.command for it in ITEMS if it.name == item)
    values = list(pairwise(options))
    providers = tuple(value for option, value in values if option == "--provider")
    (pattern,) = (value for option, value in values if option == "--case")
    request = Request(BENCHMARKS[name].cases, pattern=pattern, providers=providers)
    cases = [case for _, case in chosen(Benchmark(request.cases).load()(), request)]
    assert len(cases) == len(titles)
    assert all(re.search(wanted, title({"shape": case.shape})) for wanted, case in zip(titles, cases, strict=True))
    assert not providers or tuple(cases[0].providers) == providers


def test_command_of_a_dry_run_leaves_out_the_program_above_and_what_is_for_a_gpu(tmp_path: Path) -> None:
    item = Item("a", 1, 10, ("-m", "b", "--case", "c", "OUT", "d"), under=("checker", "-x"), dry=(("--case", "c"), ("-e",)))
    python = sys.executable
    assert command_of(item, tmp_path, dry=False) == ["checker", "-x", python, "-m", "b", "--case", "c", str(tmp_path), "d"]
    assert command_of(item, tmp_path, dry=True) == [python, "-m", "b", "-e", str(tmp_path), "d"]


def test_lines_of_items_that_lack_a_program_fail_and_leave_processes(tmp_path: Path) -> None:
    marker = tmp_path / "alive"
    leaves = f"import subprocess; subprocess.Popen(['sh', '-c', 'sleep 1; touch {marker}']); print('first\\nlast')"
    items = [
        Item("no checker", 1, 5, ("-c", ""), under=("no-such-checker",)),
        Item("fails", 1, 5, ("-c", "import os; print('before', flush=True); os.abort()")),
        Item("leaves", 1, 5, ("-c", leaves)),
        Item("hangs", 1, 1.5, ("-c", "import time; time.sleep(60)")),
    ]
    found = [(line["status"], line["reason"]) for line in lines(items, tmp_path, os.environ, dry=False)]
    assert found == [
        ("missing", "no-such-checker is not on this machine"),
        ("failed", "exit code -6\nbefore"),
        ("done", "last"),
        ("timed out", "stopped after 2 seconds"),
    ]
    assert not marker.exists()


def test_log_of_an_item_that_prints_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_light, "LOG_BYTES", 1000)
    items = [Item("prints", 1, 5, ("-c", "print('x\\n' * 10_000)")), Item("fails", 1, 5, ("-c", "exit('why')"))]
    _, line = lines(items, tmp_path, os.environ, dry=False)
    assert (tmp_path / "first-light.log").stat().st_size < 1500 and line["reason"] == "exit code 1\nwhy"


def test_command_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_light, "has_gpu", lambda: False)
    with pytest.raises(SystemExit, match="there is no CUDA device here: `--dry-run` tries the items without one"):
        first_light.main([])


@pytest.mark.parametrize("worker", [True, False])
def test_broken_context_after_a_test_ends_its_process(worker: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> NoReturn:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0") if worker else monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    item: Any = SimpleNamespace(nodeid="test_a", get_closest_marker=lambda name: name == "gpu")
    with pytest.raises(SystemExit if worker else pytest.exit.Exception, match="1" if worker else "test_a broke"):
        conftest.pytest_runtest_teardown(item)
