"""SIGKILL and a full disk in every stage: the next attempt gives the files and counts of an unbroken one."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from finished_run import FinishedRun, output

from sbp_fast.errors import UserError
from sbp_fast.experiment.graph import stages_of

SCRIPT = Path(__file__).parent.parent / "support" / "killed_stages.py"
SAMPLE, ALL = 3, 160  # kills; tests/end_to_end/test_faults.py and test_synthesis_faults.py have those with two processes


def rerun(finished: FinishedRun, name: str, out: Path) -> None:
    """Assert that a stage, begun or not, ends with the output of an unbroken one."""
    stages_of(finished.config)[name].run(finished.step(name, out))
    assert output(out) == finished.outputs[name]


@pytest.mark.parametrize("kills", [SAMPLE, pytest.param(ALL, marks=pytest.mark.slow)])
def test_killed_stage_ends_with_the_same_output(kills: int, finished_run: FinishedRun, tmp_path: Path) -> None:
    dice, names, killed = random.Random(kills), list(stages_of(finished_run.config)), 0
    command = [sys.executable, str(SCRIPT), str(finished_run.directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        for number in range(kills):
            name, out = names[(number * 5) % len(names)], tmp_path / str(number)
            for _ in range(dice.randint(1, 2)):  # some attempts are killed twice
                print(name, out, dice.randint(1, finished_run.writes[name]), file=process.stdin, flush=True)
                ended = int(process.stdout.readline())
                assert ended in (0, signal.SIGKILL), name
                killed += ended == signal.SIGKILL
                if not ended:
                    break
            rerun(finished_run, name, out)
        process.stdin.close()
    assert killed >= kills // 2


def fail_writes(patch: pytest.MonkeyPatch, after: int) -> None:
    """Let renames and unbuffered writes fail as on a full disk, after some of them."""
    done = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal done
            done += 1
            if done > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments)

        return call

    for name in ("replace", "write"):
        patch.setattr(os, name, counted(getattr(os, name)))


def fill_disk(finished: FinishedRun, name: str, folder: Path, moments: Sequence[int]) -> None:
    """Let a stage meet a full disk after numbers of writes, then run to its end."""
    lines: list[str] = []
    for moment in moments:
        out = folder / f"{name.replace('/', '-')}-{moment}"
        with pytest.MonkeyPatch.context() as patch:
            fail_writes(patch, moment)
            try:
                stages_of(finished.config)[name].run(finished.step(name, out))
            except UserError as error:
                lines.append(str(error))
        rerun(finished, name, out)
    assert all("No space left on device" in line and "\n" not in line for line in lines), lines


@pytest.mark.parametrize("name", ["prepare", "train/baseline"])
def test_full_disk_in_a_stage_is_one_line_and_the_next_attempt_completes_it(
    name: str, finished_run: FinishedRun, tmp_path: Path
) -> None:
    fill_disk(finished_run, name, tmp_path, [finished_run.writes[name] // 2])


@pytest.mark.slow
def test_full_disk_in_every_stage_is_one_line_and_the_next_attempt_completes_it(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    dice = random.Random(0)
    for name in stages_of(finished_run.config):
        fill_disk(finished_run, name, tmp_path, [dice.randint(0, finished_run.writes[name]) for _ in range(4)])
