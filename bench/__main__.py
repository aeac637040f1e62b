"""`python -m bench [NAME ...]`: check each case, time its providers side by side, and write the figures as JSON."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine, records
from bench.registry import BENCHMARKS, benchmark
from bench.runner import measure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks named in the arguments, or all; return 1 where one that was named cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all; important cases come first")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the results; default: bench/results")
    options = parser.parse_args(arguments)
    for name in options.names:
        try:
            benchmark(name)
        except ValueError as error:
            parser.error(str(error))
    ends = time.monotonic() + options.budget
    names = options.names or list(BENCHMARKS)
    status = 0
    for index, name in enumerate(names):
        share = (ends - time.monotonic()) / (len(names) - index)
        try:
            run(name, options.out, share)
        except ImportError as error:
            print(f"{name} left out: {error}")
            status |= name in options.names
    if machine.device().type == "cpu":
        print("Left out on this machine, which has no GPU: the kernels in Triton, and third-party backends that need CUDA.")
    return status


def run(name: str, folder: Path, seconds: float) -> None:
    """Measure the cases of a benchmark, the important ones first, and write each as soon as it is measured.

    Args:
        name: of the benchmark.
        folder: of the results of all devices.
        seconds: time limit; the case that is reached last is still completed.

    Raises:
        ImportError: the benchmark needs a package that is not installed.
    """
    ends = time.monotonic() + seconds
    cases = benchmark(name).load()()
    record = records.new_record(name)
    path = records.path_of(folder, name)

    def save(row: dict[str, Any]) -> None:
        record["cases"][-1] = row
        records.save(path, record)

    print(f"\n{name} on {machine.device_name()}")
    while time.monotonic() <= ends:
        case = next(cases, None)
        if case is None:
            break
        record["cases"].append({})
        save(measure(case, ends - time.monotonic(), save))
        show(record["cases"][-1])
    else:
        print(f"\nthe time was over after {len(record['cases'])} cases of {name}: any others are left out")
    print(path)


def show(case: dict[str, Any]) -> None:
    """Print a measured case as plain text."""
    print("\n" + records.title(case))
    if not case["check"]["right"]:
        print("    WRONG against the reference: no speed is shown")
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
        print(f"    {name} left out: {reason}")


if __name__ == "__main__":
    sys.exit(main())
