"""`python -m bench [OPERATION]`: check, then time providers side by side, and keep the figures as JSON."""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.registry import OPERATIONS, Case, Tensors

ROUNDS = 15
ERROR_FACTOR = 2.0  # ours may err from float64 by this many times what the plain torch operation errs


def main() -> None:
    asked = sys.argv[1:] or list(OPERATIONS)
    unknown = set(asked) - OPERATIONS.keys()
    if unknown:
        sys.exit(f"error: no operation {', '.join(sorted(unknown))}. Choose from {', '.join(OPERATIONS)}.")
    folder = Path(__file__).parent / "results" / re.sub(r"\W+", "-", device()).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    for name in asked:
        cases = [measure(case) for case in OPERATIONS[name]()]
        show(name, cases)
        record = {"operation": name, "environment": environment(), "rounds": ROUNDS, "cases": cases}
        (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
        print(folder / f"{name}.json")


def measure(case: Case) -> dict[str, Any]:
    """Errors of every provider, and, where ours is right, seconds of each: rounds interleaved, median and quartiles."""
    exact = case.exact()
    errors = {name: error(call(), exact) for name, call in case.providers.items()}
    ours, *peers = case.providers
    right = all(errors[ours][result] <= ERROR_FACTOR * max(errors[peer][result] for peer in peers) for result in exact)
    row: dict[str, Any] = {"shape": case.shape, "unit": case.unit, "work": case.work, "errors": errors, "right": right}
    if not right:
        return row
    seconds: dict[str, list[float]] = {name: [] for name in case.providers}
    for _ in range(ROUNDS):
        for name, call in case.providers.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    row["seconds"] = {name: statistics.quantiles(times, n=4) for name, times in seconds.items()}
    ratios = {peer: [b / a for a, b in zip(seconds[ours], seconds[peer], strict=True)] for peer in peers}
    row["speed_up"] = {peer: statistics.quantiles(values, n=4) for peer, values in ratios.items()}
    return row


def error(results: Tensors, exact: Tensors) -> dict[str, float]:
    """Greatest absolute difference from float64, per result."""
    return {name: (results[name].double() - value).abs().max().item() for name, value in exact.items()}


def show(name: str, cases: list[dict[str, Any]]) -> None:
    table = Table(title=f"{name}, forward and backward, on {device()}")
    for column in ("case", "provider", "rate", "ours against it (quartiles)"):
        table.add_column(column)
    for case in cases:
        shape = ", ".join(f"{key} {value}" for key, value in case["shape"].items())
        if not case["right"]:
            table.add_row(shape, "ours", "[red]wrong: no speed is shown[/red]", "")
            continue
        for provider, (_, median, _) in case["seconds"].items():
            low, middle, high = case["speed_up"].get(provider, (1.0, 1.0, 1.0))
            ratio = f"{middle:.2f}x ({low:.2f} to {high:.2f})" if provider in case["speed_up"] else "ours"
            table.add_row(shape, provider, f"{case['work'] / median:.3g} {case['unit']}/s", ratio)
            shape = ""
    Console().print(table)


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.processor()} {torch.get_num_threads()} threads"


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "device": device(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


main()
