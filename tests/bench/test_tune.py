"""The sweep of launch configurations: its candidates, a dry run in Triton's interpreter, and the rows made of a record."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton has no build for this platform", allow_module_level=True)

import torch
from sbp_kernels import _tuned

from bench.aot.compilation import launches
from bench.compilations import ARCHITECTURES, attention
from bench.runner import measure
from bench.tune import __main__ as tune
from bench.tune import candidates
from bench.tune.adoption import fastest, measured_rows, merged, write
from bench.tune.candidates import Subject, fits, launcher, subjects, title, without_data
from bench.tune.cases import sweep

ROOT = Path(__file__).parents[2]


def record(capability: str = "9.0", kernels: tuple[str, ...] = _tuned.KERNELS) -> dict[str, Any]:
    """A record in which 64 rows are best for the forward alone, 128 for the forward and dQ together."""
    seconds = {
        "forward": {"128 x 64, 8 warps, 3 stages": 2.0, "128 x 32, 8 warps, 4 stages": 2.5, "64 x 64, 4 warps, 2 stages": 1.5},
        "dq": {"128 x 64, 8 warps, 2 stages": 5.0, "128 x 128, 8 warps, 1 stages": 3.0, "64 x 32, 4 warps, 2 stages": 4.0},
        "dk_dv": {"128 x 32, 8 warps, 2 stages": 4.0, "64 x 64, 4 warps, 1 stages": 3.0},
    }
    cases = [
        {
            "shape": {"kernel": kernel, "capability": capability, "width": 128, "distribution": "long"},
            "seconds": {name: [value / 2, value, value * 2] for name, value in seconds[kernel].items()},
        }
        for kernel in kernels
    ]
    return {"environment": {"device": "NVIDIA H200", "commit": "abc"}, "cases": cases}


BEST = {
    "query_rows": 128,
    "key_rows": 64,
    "forward": {"step": 64, "warps": 8, "stages": 3},
    "dq": {"step": 128, "warps": 8, "stages": 1},
    "dk_dv": {"step": 64, "warps": 4, "stages": 1},
}


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuned, "architecture", lambda device: "9.0")


def test_measured_rows_hold_the_fastest_launches_of_tiles_that_forward_and_dq_share() -> None:
    (row,) = measured_rows(record())
    key = {"capability": "9.0", "width": 128, "dtype": "bfloat16", "distribution": "long"}
    assert row == key | BEST | {"measured": True, "device": "NVIDIA H200", "commit": "abc"}


def test_measured_rows_of_a_sweep_that_ended_early_are_none() -> None:
    assert measured_rows(record(kernels=("forward", "dk_dv"))) == []
    failed = record()
    failed["cases"][1] = {"shape": failed["cases"][1]["shape"], "failed": "out of resources"}
    assert measured_rows(failed) == []


def test_fastest_without_shared_tiles_says_so() -> None:
    low, high = {"64 x 32, 4 warps, 2 stages": 1.0}, {"128 x 32, 8 warps, 2 stages": 1.0}
    with pytest.raises(ValueError, match="no tiles were measured with both"):
        fastest({"forward": low, "dq": high, "dk_dv": low})


def test_adopted_rows_replace_those_with_their_key_and_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, results = tmp_path / "tuned.json", tmp_path / "tune.json"
    path.write_bytes(_tuned.PATH.read_bytes())
    before = json.loads(path.read_text())
    monkeypatch.setattr(_tuned, "PATH", path)
    results.write_text(json.dumps(record()))
    assert tune.main(["--adopt", str(results)]) == 0
    after = json.loads(path.read_text())
    assert len(after) == len(before) and sum(a != b for a, b in zip(after, before, strict=True)) == 1
    assert _tuned.parsed(after)["9.0", 128, "bfloat16", "long"].sizes == (128, 128, 64, 64)
    assert len(path.read_text().splitlines()) == len(after) + 2  # a row a line
    write(path, merged(after, measured_rows(record("12.0"))))
    assert len(json.loads(path.read_text())) == len(before) + 1


def test_adoption_of_a_record_made_without_a_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tune.json"
    path.write_text(json.dumps(record(capability="")))
    with pytest.raises(SystemExit):
        tune.main(["--adopt", str(path)])
    assert "was not measured on a GPU" in capsys.readouterr().err


@pytest.mark.usefixtures("on_hopper")
def test_candidates_begin_with_the_current_launch_and_are_what_their_titles_say() -> None:
    for subject in subjects():
        found = subject.candidates()
        assert next(iter(found.values())) == subject.current() and 8 <= len(found) <= 24
    subject = Subject("dq", 128, "long")
    name, configuration = list(subject.candidates().items())[-1]
    run = launcher("dq", configuration, without_data(subject, configuration))
    (compilation,) = launches("a", run)
    constants, options = compilation.constants, compilation.options
    assert name == f"{constants['ROWS']} x {constants['STEP']}, {options['num_warps']} warps, {options['num_stages']} stages"
    assert compilation.kernel.fn.__name__ == "dq_kernel" and title("dq", configuration) == name


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        (("forward", 128, 64, 8, 3, 128), True),
        (("forward", 128, 64, 4, 3, 128), False),  # 192 sums a thread
        (("forward", 128, 128, 8, 4, 128), False),  # 288 KiB of tiles
        (("dk_dv", 64, 64, 4, 1, 128), False),  # two accumulators and two tiles of scores
        (("dk_dv", 64, 32, 4, 1, 128), True),
    ],
)
def test_fits_by_sums_a_thread_and_shared_memory(launch: tuple[str, int, int, int, int, int], expected: bool) -> None:
    assert fits(*launch) == expected


@pytest.mark.usefixtures("on_hopper")
def test_compilation_before_the_sweep_goes_through_the_launchers_and_survives_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names: list[str] = []

    def compile_one(kernel: Any, grid: object) -> Callable[..., None]:
        def start(*arguments: Any, **options: Any) -> None:
            names.append(kernel.fn.__name__)
            if names[-1] == "dq_kernel":
                raise RuntimeError("out of registers")

        return start

    monkeypatch.setattr(candidates, "compile_into_cache", compile_one)
    candidates.compile_all(1, 7)
    count = sum(len(subject.candidates()) for subject in subjects())
    assert set(names) == {"forward_kernel", "dq_kernel", "dk_dv_kernel"} and len(names) == -(-(count - 1) // 7)
    assert "out of registers" in capsys.readouterr().err


def test_candidates_in_the_interpreter_agree_and_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_TINY", "1")
    case = list(sweep())[-1]  # of dK and dV, which reads what the other kernels compute
    row = measure(replace(case, schedule=replace(case.schedule, rounds=1, min_rounds=1)))
    assert list(row["seconds"]) == ["16 x 16, 4 warps, 2 stages", "32 x 16, 4 warps, 1 stages"]
    assert row["disagreement"]["32 x 16, 4 warps, 1 stages"] < 0.01 and not row["left_out"]


def test_every_row_of_the_table_is_compiled_ahead_of_time() -> None:
    compiled = {
        (it.kernel.fn.__name__, target, it.constants["D"], it.constants["ROWS"], it.constants["STEP"], *it.options.values())
        for it in attention()
        for target in it.targets
        if "STEP" in it.constants
    }
    targets = {architecture: target for target, architecture in ARCHITECTURES.items()}
    for (capability, width, _, _), row in _tuned.table().items():
        for kernel in _tuned.KERNELS:
            launch, rows = getattr(row, kernel), row.key_rows if kernel == "dk_dv" else row.query_rows
            wanted = f"{kernel}_kernel", targets[capability], width, rows, launch.step, launch.warps, launch.stages
            assert wanted in compiled


@pytest.mark.slow
def test_dry_run_writes_each_case_and_shows_rows(tmp_path: Path) -> None:
    environment = os.environ | {"BENCH_TINY": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.tune", "--budget", "100", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    (path,) = tmp_path.glob("*/tune.json")
    assert [case["shape"]["kernel"] for case in json.loads(path.read_text())["cases"]] == list(_tuned.KERNELS)
    assert done.stdout.count("measured: ") == 1


def test_sweep_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "there is no CUDA device here" in capsys.readouterr().err
