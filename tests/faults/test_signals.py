"""SIGINT and SIGTERM in every stage: it ends within seconds, says so, and its lock is held until nothing writes any more."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finished_run import FinishedRun, output
from watching import group_members, is_locked, snapshot

from sbp_fast.experiment.graph import stages_of

SCRIPT = Path(__file__).parent.parent / "support" / "interrupted_stage.py"
SECONDS = 10.0  # from the signal to the end, the abandoning of a stage that does not end by itself included
SAMPLE = (("prepare", signal.SIGINT), ("synthesize/related", signal.SIGINT), ("train/baseline", signal.SIGTERM))


def interrupt(finished: FinishedRun, name: str, number: int, out: Path, writes: int) -> None:
    """Interrupt a stage after some writes, watch it end, then run it again to the output without interruption."""
    command = [sys.executable, str(SCRIPT), str(finished.directory), name, str(out), str(int(number)), str(writes)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=out.parent
    )
    partial, unlocked = out.with_name(out.name + ".partial"), None
    while process.poll() is None:
        if unlocked is None and partial.is_dir() and not is_locked(out):
            unlocked = snapshot(out)
        time.sleep(0.005)
    printed = process.communicate()[0]
    after = snapshot(out)
    if out.exists():  # the signal came at the very end
        assert process.returncode in (0, 128 + number), printed
    else:
        assert process.returncode == 128 + number and "stopped" in printed.splitlines()[-1], printed
        assert unlocked in (None, after)
    assert "Traceback" not in printed
    time.sleep(0.2)
    assert group_members(process.pid) == [] and snapshot(out) == after
    stages_of(finished.config)[name].run(finished.step(name, out))
    assert output(out) == finished.outputs[name]


@pytest.mark.parametrize(("name", "number"), SAMPLE, ids=lambda value: getattr(value, "name", value))
def test_signal_in_a_stage_ends_it_and_the_next_attempt_completes_it(
    name: str, number: signal.Signals, finished_run: FinishedRun, tmp_path: Path
) -> None:
    interrupt(finished_run, name, number, tmp_path / "out", writes=max(2, finished_run.writes[name] // 2))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_in_every_stage_at_random_moments(number: signal.Signals, finished_run: FinishedRun, tmp_path: Path) -> None:
    dice = random.Random(int(number))
    for index, name in enumerate(stages_of(finished_run.config)):
        started = time.monotonic()
        interrupt(finished_run, name, number, tmp_path / str(index), writes=dice.randint(1, finished_run.writes[name]))
        print(f"{name}: {time.monotonic() - started:.1f} s")
