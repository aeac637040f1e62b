"""Several processes draw the documents that one draws."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rounding import NEEDS_SAME_BITS
from tiny_synthesis import command, documents, make_inputs, make_python, run

from sbp_fast.pipeline.stage import Manifest


@NEEDS_SAME_BITS
@pytest.mark.parametrize("backend", ["engine", "vllm"])
def test_two_processes_draw_what_one_draws(tmp_path: Path, backend: str) -> None:
    inputs = make_inputs(tmp_path)
    how = (f"synthesize.backend={backend}", f"synthesize.vllm_python={make_python(tmp_path / 'python')}", "device=cpu")
    run(inputs, tmp_path / "one", *how)
    launcher = [sys.executable, "-m", "sbp_fast", *command(inputs, tmp_path / "two", *how), "--gpus", "2"]
    done = subprocess.run(launcher, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es)" in done.stdout and "drawn by the first process" in done.stdout
    assert documents(tmp_path / "two") == documents(tmp_path / "one")
    one, two = (Manifest.load(tmp_path / name) for name in ("one", "two"))
    assert (one.counts, one.fingerprint) == (two.counts, two.fingerprint)
