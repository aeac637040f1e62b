"""`python -m bench.tune`: time the candidates of every attention kernel on this GPU and write the fastest as a table.

The record of the sweep, written after each case, is OUT/<device>/tune.json. `python -m bench.tune --adopt` that record puts its
rows into the package's table, which needs no GPU; `make aot` compiles them. Without a GPU the sweep runs only with BENCH_TINY=1
and TRITON_INTERPRET=1, which try its code.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sbp_kernels import _tuned

from bench import records
from bench.supervisor import Supervision, WorkerLost
from bench.tune.adoption import measured_rows, merged, write
from bench.worker import Request

COMPILING = 0.5  # share of the budget after which what is not compiled is left to the sweep itself
COMPILE = (sys.executable, "-m", "bench.tune.candidates")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep or adopt its record, and return 1 where that gives no row of the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all; what matters most comes first")
    parser.add_argument("--step", type=float, default=30.0, help="seconds after which one step of a candidate is ended")
    parser.add_argument("--case", default="", metavar="REGEX", help="only the cases in whose line of shape it is found")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile the candidates first")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the results; default: bench/results")
    parser.add_argument("--adopt", type=Path, metavar="RECORD", help="write the rows of a record into the package's table")
    options = parser.parse_args(arguments)
    if options.adopt:
        record = json.loads(options.adopt.read_text())
        if not all(case["shape"]["capability"] for case in record["cases"]):
            parser.error(f"{options.adopt} was not measured on a GPU: run the sweep on one")
        return adopt(record)
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("there is no CUDA device here")
    ends = time.monotonic() + options.budget
    if torch.cuda.is_available():
        compile_candidates(options.processes, options.budget * COMPILING)
    supervision = Supervision("tune", options.out, show, options.step)
    try:
        supervision.run(Request("bench.tune.cases:sweep", ends - time.monotonic(), options.case))
    except WorkerLost as error:
        print(f"the sweep ended before its first case: {error}", flush=True)
    if supervision.path is None or not supervision.path.exists():
        return 1
    return _report(measured_rows(json.loads(supervision.path.read_text())))


def compile_candidates(processes: int, seconds: float) -> None:
    """Compile all candidates into Triton's cache in processes of their own, which end after so many seconds."""
    ends = time.monotonic() + seconds
    running = [subprocess.Popen([*COMPILE, str(index), str(processes)]) for index in range(processes)]
    for process in running:
        try:
            process.wait(None if seconds == float("inf") else max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def show(case: dict[str, Any]) -> None:
    """Print a measured case: its candidates, the fastest first."""
    print("\n" + records.title(case))
    if "failed" in case:
        print(f"    FAILED: {case['failed']}", flush=True)
        return
    current = next(iter(case["seconds"]))
    for name, (_, median, _) in sorted(case["seconds"].items(), key=lambda it: it[1][1]):
        mark = "  (current)" if name == current else ""
        print(f"    {name:32}{median * 1e3:>10.3f} ms  {case['work'] / median:>8.4g} {case['unit']}/s{mark}")
    for name, reason in case["left_out"].items():
        print(f"    {name} left out: {reason.splitlines()[0]}")
    sys.stdout.flush()


def adopt(record: dict[str, Any]) -> int:
    """Put the rows of a record into the package's table."""
    rows = measured_rows(record)
    if rows:
        write(_tuned.PATH, merged(json.loads(_tuned.PATH.read_text()), rows))
    return _report(rows)


def _report(rows: list[dict[str, Any]]) -> int:
    """Print rows of a table and return 1 where there are none."""
    for row in rows:
        print(f"measured: {json.dumps(row)}")
    if not rows:
        print("no kind of documents had all three kernels measured: no rows")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
