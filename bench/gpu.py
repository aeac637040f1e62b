"""`python -m bench.gpu`: everything that needs a GPU, in order of importance, within a budget of seconds.

Correctness comes first, then the benchmarks; each case is written as soon as it is measured. The benchmarks of the kernels
need torch, triton, numpy and numba alone; training and generation need the project's other packages too. Third-party backends
are measured, and the tests run, where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.records import RESULTS
from bench.registry import BENCHMARKS

ROOT = Path(__file__).parent.parent
CORRECTNESS_SHARE = 0.4


def main() -> None:
    """Run the tests marked `gpu`, then each benchmark that has a share of the time left, as a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds in all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results; default: bench/results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device here: `make bench` measures what a machine without one can")
    ends = time.monotonic() + options.budget
    status = correctness(CORRECTNESS_SHARE * options.budget)
    for name, entry in BENCHMARKS.items():
        if entry.gpu_share:
            seconds = entry.gpu_share * (ends - time.monotonic())
            command = [sys.executable, "-m", "bench", name, "--budget", f"{seconds:.0f}", "--out", str(options.out)]
            status |= subprocess.run(command, cwd=ROOT, check=False).returncode
    sys.exit(status)


def correctness(seconds: float) -> int:
    """Run the tests marked `gpu` and return their exit status; the benchmarks check every case besides."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        print("pytest or hypothesis is not installed: the tests marked gpu are left out; the benchmarks still check every case")
        return 0
    complete = all(importlib.util.find_spec(name) is not None for name in ("pydantic", "hnswlib"))
    paths = ["tests/kernels", *["tests/generate/test_engine.py", "tests/neighbors/test_self_join.py"] * complete]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *paths]
    try:
        return subprocess.run(command, cwd=ROOT, check=False, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"the tests marked gpu did not end within {seconds:.0f} seconds")
        return 1


if __name__ == "__main__":
    main()
