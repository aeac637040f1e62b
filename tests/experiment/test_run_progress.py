"""What a run says about its progress: the banner, and a line for each stage that ends."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from fabricated_run import CONFIG, write_run, write_training
from recording_console import RecordingConsole

from sbp_fast.experiment.graph import stages_of
from sbp_fast.experiment.run_progress import RunProgress
from sbp_fast.experiment.time_estimate import TimeEstimate, describe_sum, read_finished
from sbp_fast.pipeline.manifest import Manifest

STAGES = stages_of(CONFIG)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("progress") / "run")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def progress(out: Path, **options: Any) -> tuple[RunProgress, list[str]]:
    console = RecordingConsole()
    return RunProgress(CONFIG, out, STAGES, STAGES, console, **options), console.lines


def test_banner_of_a_new_run_has_device_threads_directory_and_the_stages_of_unknown_speed(tmp_path: Path) -> None:
    new, lines = progress(tmp_path / "new")
    new.print_banner()
    assert lines[0] == f"run fabricated: {len(STAGES)} stages; into {tmp_path / 'new'}"
    unknown = sum(STAGES[name].cost(STAGES[name].config, TimeEstimate(CONFIG, [], 1).corpus).flops > 0 for name in STAGES)
    assert lines[1].startswith("device: cpu, 1 thread; expected: ")
    assert lines[1].endswith(f" {unknown} stages of unknown speed")


def test_banner_of_a_begun_run_counts_what_is_done_and_expects_the_rest(run: Path) -> None:
    for name in ("compare", "evaluate/oracle", "train/oracle"):
        shutil.rmtree(run / name)
    begun, lines = progress(run)
    begun.print_banner()
    assert f"{len(STAGES)} stages, {len(STAGES) - 3} of them done before" in lines[0]
    estimate = TimeEstimate(CONFIG, [manifest for name in STAGES if (manifest := read_finished(run / name))], 1)
    left = describe_sum(estimate.of_stage(STAGES[name]) for name in ("compare", "evaluate/oracle", "train/oracle"))
    assert lines[1] == f"device: cpu, 1 thread; expected: {left}" and "not known" not in left


def test_stage_that_ends_has_one_line_with_its_time_and_the_time_left(run: Path) -> None:
    manifest = Manifest.read(run / "train/oracle")
    for name in ("compare", "train/oracle"):
        shutil.rmtree(run / name)
    begun, lines = progress(run)
    begun.ended("train/baseline")
    assert lines == []  # the stage itself says that it was done before
    write_training(run / "train/oracle", "oracle", manifest.flops)
    begun.ended("train/oracle")
    number = list(STAGES).index("train/oracle") + 1
    assert lines == [f"[{number}/{len(STAGES) + 1} train/oracle] finished in 0s; left: 0s"]


def test_expected_time_is_corrected_by_each_stage_that_ends(run: Path) -> None:
    manifests = [manifest for name in STAGES if (manifest := read_finished(run / name)) and manifest.stage != "train"]
    stage = STAGES["train/oracle"]
    assert TimeEstimate(CONFIG, manifests, 1).of_stage(stage) is None
    slow = Manifest("train", {}, {}, {}, {}, flops=1e12, seconds=100.0, device="cpu", fingerprint="")
    estimate = TimeEstimate(CONFIG, [*manifests, slow], 1)
    assert estimate.of_stage(stage) == pytest.approx(estimate.cost(stage).flops / 1e10)
    assert estimate.corpus.tokens == read_finished(run / "prepare").counts["tokens"]  # type: ignore[union-attr]


def test_sum_of_times_counts_the_unknown_and_divides_by_what_runs_side_by_side() -> None:
    assert describe_sum([60, 65]) == "2m05s"
    assert describe_sum([60, 66, None], at_a_time=2) == "at least 1m03s, not counting 1 stage of unknown speed"
    assert describe_sum([0.2, None]) == "not known yet: 1 stage of unknown speed" and describe_sum([0.2]) == "0s"
    assert describe_sum([]) == "0s"


def test_damaged_manifest_counts_as_unfinished(run: Path) -> None:
    (run / "embed" / "manifest.json").write_text("{")
    assert read_finished(run / "embed") is None and read_finished(run / "prepare") is not None
