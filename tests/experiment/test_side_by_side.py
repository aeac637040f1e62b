import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.errors import TransientError, UserError
from sbp_fast.experiment.costs import Cost
from sbp_fast.experiment.graph import Stage, Step, stages_of
from sbp_fast.experiment.run import run
from sbp_fast.experiment.side_by_side import Share, _most_needed_first, _receive, run_side_by_side
from sbp_fast.pipeline.progress import Console

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(["demo"])


def test_stages_that_most_others_wait_for_come_first(config: RunConfig) -> None:
    order = _most_needed_first(stages_of(config))
    assert order[0] == "prepare" and order[-1] == "compare"
    chain = ["embed", "pair/related", "tune/related", "synthesize/related", "filter/related", "train/sbp", "evaluate/sbp"]
    assert [name for name in order if name in chain] == chain
    assert order.index("filter/related") < order.index("train/baseline-seed-1")


def test_refusal_of_a_stage_is_raised_and_ends_the_processes(tmp_path: Path) -> None:
    config = load_config(["small"], [f"corpus.path='{tmp_path / 'absent.jsonl'}'", "device=cpu"])
    with pytest.raises(UserError, match=r"absent\.jsonl"):
        run_side_by_side(config, tmp_path / "run", ["prepare"], processes=2, force=False, console=QUIET)
    assert multiprocessing.active_children() == []


def end_by(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("target", "argument", "kind", "message"),
    [
        (end_by, signal.SIGKILL, TransientError, "train/sbp: its process was killed, .*; rerun: it resumes"),
        (os._exit, 9, UserError, "train/sbp: its process ended with exit code 9; see what it printed"),
    ],
    ids=["killed", "failed"],
)
def test_process_that_ends_is_named_by_its_stage(
    target: Callable[[int], None], argument: int, kind: type[UserError], message: str
) -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(argument,))
    process.start()
    there.close()
    with pytest.raises(UserError, match=message) as raised:
        _receive(here, process, "train/sbp")
    assert type(raised.value) is kind


@pytest.mark.parametrize("options", [{"gpus": 2}, {"workers": type("Elsewhere", (), {"local": False})()}])
def test_side_by_side_excludes_other_ways_to_divide_the_work(
    options: dict[str, Any], config: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="exclude each other"):
        run(config, tmp_path / "run", console=QUIET, side_by_side=2, **options)
    assert not (tmp_path / "run").exists()


def test_side_by_side_on_a_gpu_is_refused(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_fast.experiment.side_by_side.resolve_device", lambda config: "cuda")
    with pytest.raises(UserError, match="this run's device is cuda"):
        run_side_by_side(config, tmp_path, ["prepare"], processes=2, force=False, console=QUIET)


def run_in_stage(step: Step) -> None:
    with step.console.task("documents counted", 3, "documents") as task:
        task.advance(3)
    step.console.say("3 documents")
    step.console.detail("cache precision bfloat16")
    if step.force:
        raise UserError("input", "is wrong", "correct it")


@pytest.mark.parametrize("verbose", [False, True])
def test_lines_of_stages_are_relayed_to_the_process_with_the_terminal(
    verbose: bool, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {"count": Stage("count", {}, run_in_stage, lambda config, corpus: Cost(0), config)}
    monkeypatch.setattr("sbp_fast.experiment.side_by_side.stages_of", lambda config: stages)
    for force in (False, True):
        here, there = multiprocessing.Pipe()
        here.send("count")
        here.send(None)
        Share(config, tmp_path, force, quiet=False, verbose=verbose, relayed=True).run(there)
        process = multiprocessing.Process()
        assert _receive(here, process, "count") == "[1/2 count] 3 documents"
        if verbose:
            assert _receive(here, process, "count") == "[1/2 count] cache precision bfloat16"
        if force:
            with pytest.raises(UserError, match="is wrong"):
                _receive(here, process, "count")
        else:
            assert _receive(here, process, "count") is None
