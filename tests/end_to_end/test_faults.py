"""A training run that is killed again and again ends with the weights of one that nobody touched."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from overrides import overridden
from tiny_training import SETTINGS, configure, make_corpus, train_arm

KILLS = 20
CHANGES = ("pretrain={tokens=307200, tokens_per_step=256, microbatch_tokens=128}", "checkpoint={seconds=0.1, keep=2}")


def lines(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_training_killed_at_random_ends_with_the_same_weights(processes: int, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    command = [
        sys.executable,
        "-m",
        "sbp_fast",
        "train",
        str(tmp_path / "empty.toml"),
        f"corpus.path={tmp_path}/documents.jsonl",
    ]
    command += [*overridden(SETTINGS, *CHANGES), "device=cpu", "--corpus", str(corpus)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: str) -> subprocess.Popen[bytes]:
        arguments = [*command, "--out", str(tmp_path / out), "--gpus", str(processes)]
        return subprocess.Popen(arguments, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)

    if processes == 1:
        train_arm(configure(tmp_path, *CHANGES), tmp_path / "whole", corpus=corpus)
    else:
        assert start("whole").wait() == 0
    dice, killed = random.Random(0), 0
    for _ in range(10 * KILLS):
        run, partial = start("broken"), tmp_path / "broken.partial"
        begun, patience = lines(partial), dice.randint(0, 60) if killed < KILLS else 10**9
        while run.poll() is None and lines(partial) < begun + patience:
            time.sleep(0.01)
        if run.poll() is not None:
            assert run.returncode == 0
            break
        time.sleep(dice.random() * 0.1)
        for number in children(run.pid):
            os.kill(number, signal.SIGKILL)
        run.wait()
        killed += 1
    assert killed >= KILLS
    for name in ("weights.safetensors", "model.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def children(process: int) -> list[int]:
    """A process and all that it started, which may lead sessions of their own."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in listing.splitlines()]
    processes = [process]
    for parent in processes:  # grows as it goes
        processes += [pid for pid, ppid in parents if ppid == parent]
    return processes
