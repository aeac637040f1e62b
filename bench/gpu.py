"""`python -m bench.gpu`: everything that a GPU machine is needed for, in order of importance, within a budget of seconds.

Correctness first, then the benches; what has been measured is written as it comes. Only torch, triton, numpy and numba are
needed; peers are measured, and pytest's tests run, where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
OPERATIONS = ("attention", "loss", "small", "plan")  # shares of the time that is left, in this order
SHARES = (0.6, 0.5, 0.7, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds in all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device here: `make bench` measures what a machine without one can")
    ends = time.monotonic() + asked.budget
    status = correctness(0.4 * asked.budget)
    for operation, share in zip(OPERATIONS, SHARES, strict=True):
        seconds = share * (ends - time.monotonic())
        command = [sys.executable, "-m", "bench", operation, "--budget", f"{seconds:.0f}", "--out", str(asked.out)]
        status |= subprocess.run(command, cwd=ROOT, check=False).returncode
    print("Not here yet, so not measured: a training step of the 3B model, generation.")
    sys.exit(status)


def correctness(seconds: float) -> int:
    """The tests marked `gpu`; the benches check every case against float64 besides."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        print("pytest or hypothesis is not installed: the tests marked gpu are left out; the benches still check every case")
        return 0
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"]
    try:
        return subprocess.run(command, cwd=ROOT, check=False, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"the tests marked gpu did not end within {seconds:.0f} seconds")
        return 1


if __name__ == "__main__":
    main()
