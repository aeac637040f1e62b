"""Synthesis that is killed again and again."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rounding import NEEDS_SAME_BITS
from test_faults import children
from tiny_synthesis import command, make_inputs

from sbp_fast.pipeline.manifest import Manifest

CHANGES = ("pretrain.tokens=122880", "device=cpu")


def saved_bytes(partial: Path) -> int:
    """Return the bytes of documents that are safe so far."""
    size = 0
    for file in [*partial.glob("parts/*.journal"), *partial.glob("tokens-*.bin")]:
        with suppress(FileNotFoundError):  # a journal goes when its shard is written
            size += file.stat().st_size
    return size


@NEEDS_SAME_BITS
@pytest.mark.slow  # tests/faults/test_kills.py kills a sample of stages, this one among them
@pytest.mark.parametrize("kills", [2, 20])
@pytest.mark.parametrize("processes", [1, 2])
def test_synthesis_killed_at_random_gives_the_same_files(kills: int, processes: int, tmp_path: Path) -> None:
    inputs, dice, killed = make_inputs(tmp_path), random.Random(0), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: str) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-m", "sbp_fast", *command(inputs, tmp_path / out, *CHANGES), "--gpus", str(processes)]
        return subprocess.Popen(arguments, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    partial = tmp_path / "broken.partial"
    for _ in range(10 * kills):
        run, begun = start("broken"), saved_bytes(partial)
        patience = dice.randint(1, 5_000) if killed < kills else 10**12
        while run.poll() is None and saved_bytes(partial) < begun + patience:
            time.sleep(0.002)
        if run.poll() is not None:
            assert run.returncode == 0
            break
        for number in children(run.pid):
            os.kill(number, signal.SIGKILL)
        run.wait()
        killed += 1
    assert killed >= kills
    whole, broken = (Manifest.load(tmp_path / name) for name in ("whole", "broken"))
    assert broken.files == whole.files and broken.counts == whole.counts
