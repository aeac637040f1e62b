"""`python -m bench.gpu`: everything that a GPU machine is needed for, in order of importance, within a budget of seconds.

Correctness first, then the benches; what has been measured is written as it comes. Only torch, triton, numpy and numba are
needed for the kernels; the steps of the 3B model and generation need the project's small packages too; peers are measured, and
pytest's tests run, where they are installed.
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
# what is run, in this order, each for a share of the time that is left
SHARES = {"attention": 0.3, "generation": 0.4, "training": 0.6, "loss": 0.5, "small": 0.7, "pairs": 0.7, "plan": 1.0}
PROGRAMS = ("generation", "training")  # that are no operations of `python -m bench`


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds in all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device here: `make bench` measures what a machine without one can")
    ends = time.monotonic() + asked.budget
    status = correctness(0.4 * asked.budget)
    for operation, share in SHARES.items():
        seconds = share * (ends - time.monotonic())
        program = [f"bench.{operation}"] if operation in PROGRAMS else ["bench", operation]
        command = [sys.executable, "-m", *program, "--budget", f"{seconds:.0f}", "--out", str(asked.out)]
        status |= subprocess.run(command, cwd=ROOT, check=False).returncode
    sys.exit(status)


def correctness(seconds: float) -> int:
    """The tests marked `gpu`; the benches check every case against float64 besides."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        print("pytest or hypothesis is not installed: the tests marked gpu are left out; the benches still check every case")
        return 0
    whole = all(importlib.util.find_spec(name) is not None for name in ("pydantic", "hnswlib"))
    places = ["tests/kernels", *["tests/generate/test_engine.py", "tests/neighbors/test_self_join.py"] * whole]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *places]
    try:
        return subprocess.run(command, cwd=ROOT, check=False, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"the tests marked gpu did not end within {seconds:.0f} seconds")
        return 1


if __name__ == "__main__":
    main()
