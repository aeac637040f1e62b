"""`python -m bench [NAME ...]`: check each case, time its providers side by side, and write the figures as JSON."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import records
from bench.registry import BENCHMARKS, benchmark
from bench.supervisor import STEP_SECONDS, Supervision, WorkerLost
from bench.worker import Request


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks named in the arguments, or all; return 1 where one that was named cannot run here."""
    options = parser().parse_args(arguments)
    for name in options.names:
        try:
            benchmark(name)
        except ValueError as error:
            parser().error(str(error))
    ends = time.monotonic() + options.budget
    names = options.names or list(BENCHMARKS)
    status = 0
    for index, name in enumerate(names):
        share = (ends - time.monotonic()) / (len(names) - index)
        request = Request(benchmark(name).cases, share, options.case, tuple(options.provider))
        try:
            complete = run(name, request, options.out, options.step)
        except (ImportError, WorkerLost) as error:
            print(f"{name} left out: {error}", flush=True)
            complete = False
        status |= not complete and name in options.names
    return status


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    arguments = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    arguments.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all by default")
    arguments.add_argument("--budget", type=float, default=float("inf"), help="seconds in all; important cases come first")
    arguments.add_argument("--step", type=float, default=STEP_SECONDS, help="seconds after which a provider's step is ended")
    arguments.add_argument("--case", default="", metavar="REGEX", help="only the cases in whose line of shape it is found")
    arguments.add_argument("--provider", action="append", default=[], metavar="NAME", help="only these providers (repeatable)")
    arguments.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the results; default: bench/results")
    return arguments


def run(name: str, request: Request, folder: Path, step_seconds: float) -> bool:
    """Measure the cases of a benchmark, the important ones first, and write each as soon as it is measured.

    Returns:
        Whether something was measured and nothing of ours failed.

    Raises:
        ImportError: the benchmark needs a package that is not installed.
        WorkerLost: the benchmark ended the process before its first case.
    """
    print(f"\n{name}", flush=True)
    supervision = Supervision(name, folder, show, step_seconds)
    if not supervision.run(request):
        print(f"\nthe time was over after {len(supervision.rows)} cases of {name}: any others are left out")
    if not supervision.rows:
        print(f"no case of {name} can be measured here")
    print(supervision.path, flush=True)
    return all("failed" not in row for row in supervision.rows.values()) and bool(supervision.rows)


def show(case: dict[str, Any]) -> None:
    """Print a measured case as plain text."""
    print("\n" + records.title(case))
    if "failed" in case:
        print(f"    FAILED: {case['failed']}", flush=True)
        return
    if not case["check"]["right"]:
        print("    WRONG against the reference: no speed is shown", flush=True)
        return
    least = records.roofline_seconds(case)
    for name, (_, median, _) in case["seconds"].items():
        rate = f"{case['work'] / median:.4g} {case['unit']}/s"
        share = f"{least / median:.0%} of the roofline" if least else ""
        memory = f"{case['memory'][name] / 1e6:.0f} MB" if case["memory"][name] is not None else ""
        speed_up = "speed-up {1:.2f} ({0:.2f} to {2:.2f})".format(*case["speed_up"][name]) if name in case["speed_up"] else ""
        print(f"    {name:32}{median * 1e3:>10.3f} ms  {rate:>26}  {share:>20}  {memory:>10}  {speed_up}")
    for name, value in case["statistics"].items():
        print(f"    {name}: {value:.3g}")
    for name, reason in case["left_out"].items():
        print(f"    {name} left out: {reason.splitlines()[0]}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
