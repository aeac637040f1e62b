"""Signals to a command and to its processes, seen from outside."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from watching import group_members, is_locked, snapshot

SCRIPT = Path(__file__).parent.parent / "support" / "lifetimes.py"


@contextmanager
def running(kind: str, folder: Path, processes: int = 1) -> Iterator[subprocess.Popen[str]]:
    """Start a command, and wait until all its processes write."""
    command = [sys.executable, str(SCRIPT), kind, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while len(list(folder.glob("log-*"))) < processes:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        yield process
    finally:
        for member in group_members(process.pid):
            os.kill(member, signal.SIGKILL)
        process.wait()


def assert_gone(process: subprocess.Popen[str], folder: Path, seconds: float) -> str:
    """Assert that a command and all its processes end in time, and write nothing afterwards; return what was printed."""
    printed = "".join(process.communicate(timeout=seconds))
    limit = time.monotonic() + 2
    while group_members(process.pid) and time.monotonic() < limit:
        time.sleep(0.02)
    assert group_members(process.pid) == []
    before = snapshot(folder)
    time.sleep(0.1)
    assert snapshot(folder) == before and "Traceback" not in printed
    return printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["threads", "blocked"])
def test_command_that_does_not_end_by_itself_is_abandoned_with_its_lock(
    kind: str, number: signal.Signals, tmp_path: Path
) -> None:
    with running(kind, tmp_path) as process:
        process.send_signal(number)
        time.sleep(0.3)
        assert is_locked(tmp_path / "out") and process.poll() is None  # the thread writes still
        printed = assert_gone(process, tmp_path, 10)
    assert process.returncode == 128 + number
    assert [line.split(":")[0].split(";")[0] for line in printed.splitlines()] == ["stopping", "stopped"]
    assert not is_locked(tmp_path / "out")


SLOW_TO_ANNOUNCE = """
import os, signal, sys, time
from sbp_fast.cli import run_command
from sbp_fast.pipeline import interrupts

def say(message, say=interrupts.say):
    time.sleep(0.3 * (message == interrupts.STOPPING))
    say(message)

def interrupted():
    os.kill(os.getpid(), signal.SIGTERM)

def saved():
    with interrupts.StopRequest():
        interrupted()
        raise interrupts.Stopped(signal.SIGTERM, 7)

interrupts.say = say
run_command(globals()[sys.argv[1]])
"""


@pytest.mark.parametrize("end", ["saved", "interrupted"])
def test_last_word_stands_below_the_announcement(end: str) -> None:
    command = [sys.executable, "-c", SLOW_TO_ANNOUNCE, end]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert [line.split()[0].strip(":;") for line in done.stdout.splitlines()] == ["stopping", "stopped"]


def test_second_signal_abandons_at_once(tmp_path: Path) -> None:
    with running("threads", tmp_path) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert_gone(process, tmp_path, 10)
        assert time.monotonic() - started < 1.0 and process.returncode == 130


@pytest.mark.parametrize("whole_group", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_launcher_ends_its_ranks(number: signal.Signals, whole_group: bool, tmp_path: Path) -> None:
    if whole_group and number == signal.SIGTERM:
        pytest.skip("no keyboard sends it to all")
    with running("ranks", tmp_path, 2) as process:
        (os.killpg if whole_group else os.kill)(process.pid, number)
        printed = assert_gone(process, tmp_path, 10)
    assert process.returncode == 128 + number and "stopped; the same command resumes from here" in printed


def test_ranks_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    with running("ranks", tmp_path, 2) as process:
        process.kill()
        assert_gone(process, tmp_path, 10)


def test_killed_rank_is_one_line_and_ends_the_others(tmp_path: Path) -> None:
    with running("ranks", tmp_path, 2) as process:
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
        printed = assert_gone(process, tmp_path, 10)
    assert process.returncode == 2
    assert printed.startswith("error: --gpus 2: a process was killed by signal 9, most likely for want of memory; rerun")
    assert len(printed.splitlines()) == 1
