"""`python -m bench.first_light`: everything to learn in the first minutes on a GPU, each item in a process with a time limit.

Part 1 needs torch, triton, numpy, numba and pytest; part 2 the project's other packages too. An item that fails, hangs or lacks
a program ends with a line that says so, and the next begins. Each item's line is written to OUT/first-light.jsonl as it ends,
what the items print is in OUT/first-light.log, and the benchmarks write OUT/<device>/<benchmark>.json after each case.

What measures comes before what may hang: the forms for Hopper, flex and the sanitizer.

Folders of `make gpu-prepare` (`--prepared`) are unpacked first, so that what they hold need not be installed or compiled.

`--dry-run` runs the same items without a GPU, with tiny shapes and Triton's interpreter, and after them one that must fail.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_prepare import archive

ROOT = Path(__file__).parent.parent
PART_SECONDS = {1: 560, 2: 180}  # what the limits of a part's items may add up to
TEST_SECONDS = 25  # limit of one test: only a kernel that does not end takes as long
LOG_BYTES = 1 << 20  # of one item
REASON_LINES = 8


@dataclass(frozen=True)
class Item:
    """One thing to run.

    Attributes:
        name: of the item.
        part: 1 or 2.
        seconds: hard limit.
        command: arguments of Python; OUT stands for the folder of the results.
        under: program that runs Python, with its arguments; none where empty.
        dry: part of the command that a dry run replaces, and what replaces it.
    """

    name: str
    part: int
    seconds: float
    command: tuple[str, ...]
    under: tuple[str, ...] = ()
    dry: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


def gpu_tests(name: str, part: int, seconds: float, *arguments: str, workers: int = 12, under: tuple[str, ...] = ()) -> Item:
    """Tests marked `gpu`; one that takes too long ends its worker, for which pytest-xdist starts another."""
    limits = ("-o", f"faulthandler_timeout={TEST_SECONDS}", "-o", "faulthandler_exit_on_timeout=true")
    command = ("-m", "pytest", "-q", "-m", "gpu", "-n", str(workers), *limits, *arguments)
    return Item(name, part, seconds, command, under, dry=(("-n", str(workers)), ("-n", "0")))


def benchmark(name: str, part: int, seconds: float, *arguments: str, case: str = "") -> Item:
    """A benchmark; its last case may begin until two thirds of the time are over, and a step may take half of it."""
    budget = ("--budget", f"{seconds * 2 / 3:.0f}", "--step", f"{seconds / 2:.0f}")
    only = ("--case", case) if case else ()
    command = ("-m", "bench", *arguments, *budget, *only, "--out", "OUT")
    return Item(name, part, seconds, command, dry=(only, ()))


KERNELS = "tests/kernels"
SANITIZED = (
    f"{KERNELS}/test_nearest.py::test_on_a_gpu[1-dtype1]",
    f"{KERNELS}/test_linear_cross_entropy_kernels.py::test_no_host_device_synchronisation[slab]",
    f"{KERNELS}/test_decode.py::test_on_a_gpu[dtype0-stored0-1]",
    f"{KERNELS}/test_attention.py::test_the_form_for_hopper_on_a_gpu[triton-hopper-64-tiles1-forest0]",
    f"{KERNELS}/test_attention.py::test_the_form_for_hopper_on_a_gpu[gluon-hopper-64-tiles1-forest0]",
)
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
GOAL_LENGTHS = "(lognormal, mean 821|dense|8 partners a seed)"
GOAL_ATTENTION = f"lengths {GOAL_LENGTHS}, tokens (16384|8192), heads 64:8, width 128, pass (forward|backward)"
GOAL_LOSS = "rows 16384, with loss 0.5, width 4096"
EAGER_LAYERS = ("--provider", "ours, eager layers", "--provider", "torch, eager layers")

ITEMS = (
    Item("ceilings", 1, 20, ("-m", "bench.machine")),
    gpu_tests("correctness", 1, 80, KERNELS, "-k", "not flex and not hopper"),
    benchmark("attention", 1, 90, "attention", case=GOAL_ATTENTION),
    Item("sweep", 1, 120, ("-m", "bench.tune", "--budget", "80", "--step", "30", "--out", "OUT")),
    benchmark("loss", 1, 60, "loss", case=GOAL_LOSS),
    benchmark("small operations", 1, 40, "small"),
    benchmark("nearest", 1, 30, "pairs"),
    gpu_tests("correctness, forms for Hopper", 1, 40, KERNELS, "-k", "hopper", workers=4),
    gpu_tests("correctness, flex", 1, 30, KERNELS, "-k", "flex", workers=4),
    gpu_tests("memcheck", 1, 25, *SANITIZED, workers=0, under=(*SANITIZER, "memcheck")),
    gpu_tests("racecheck", 1, 25, *SANITIZED, workers=0, under=(*SANITIZER, "racecheck")),
    benchmark("training steps", 2, 60, "training", *EAGER_LAYERS, case=r"gpus 1$"),
    benchmark("decode step by kernel", 2, 70, "decode-steps", case="samples a seed 8"),
    gpu_tests(
        "correctness, generation and pairs",
        2,
        50,
        "tests/generate/test_engine.py",
        "tests/neighbors/test_self_join.py",
        workers=2,
    ),
)
PLANTED = Item("planted failure", 0, 1, ("-c", "print('this item hangs', flush=True); import time; time.sleep(3600)"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the items that the arguments choose and return 1 where one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.first_light", description=__doc__)
    parser.add_argument("--part", type=int, choices=PART_SECONDS, help="1 or 2; both by default")
    parser.add_argument("--only", action="append", metavar="ITEM", choices=[item.name for item in ITEMS], help="repeatable")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes without a GPU, and an item that must fail")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "first-light", help="default: runs/first-light")
    parser.add_argument("--prepared", type=Path, nargs="*", default=[], metavar="FOLDER", help="of `make gpu-prepare`")
    options = parser.parse_args(arguments)
    if not options.dry_run and not has_gpu():
        sys.exit("error: there is no CUDA device here: `--dry-run` tries the items without one")
    items = [item for item in ITEMS if options.part in (None, item.part) and (not options.only or item.name in options.only)]
    if options.dry_run:
        items.append(PLANTED)
    options.out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | unpacked(options.prepared)
    status = 0
    with (options.out / "first-light.jsonl").open("a") as results:
        for line in lines(items, options.out.resolve(), environment, dry=options.dry_run):
            results.write(json.dumps(line) + "\n")
            results.flush()
            print(f"{line['status']:>9} {line['seconds']:6.1f} of {line['limit']:3.0f} s  {line['item']}", flush=True)
            if line["status"] != "done":
                print(f"          {line['reason']}".replace("\n", "\n          "), flush=True)
                status = 1
    return status


def has_gpu() -> bool:
    """Whether torch finds a CUDA device; a process of its own asks, so that none is held here."""
    command = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command, check=False).returncode == 0


def unpacked(folders: Sequence[Path]) -> dict[str, str]:
    """Unpack what was prepared for this machine, beside the first folder; return the variables with which it is found."""
    folders = [folder for folder in folders if (folder / archive.VERSIONS).is_file()]
    try:
        # other folders than last time are unpacked anew
        return archive.unpack(folders, folders[0].with_name(f"{folders[0].name}-unpacked-{len(folders)}")) if folders else {}
    except archive.NotPreparedForThis as problem:
        sys.exit(f"error: {problem}")


def lines(items: Sequence[Item], out: Path, environment: Mapping[str, str], *, dry: bool) -> Iterator[dict[str, Any]]:
    """Run the items one after the other and yield the line of each.

    A line holds "item", "status" ("done", "failed", "timed out" or "missing"), "seconds", "limit", "command" and "reason":
    how the item ended and the last lines that it printed, or of one that is done the last line alone.
    """
    paths = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH")]
    environment = {**environment, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONUNBUFFERED": "1"}
    if dry:
        environment |= {"BENCH_TINY": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for item in items:
        command = command_of(item, out, dry=dry)
        line = {"item": item.name, "limit": item.seconds, "command": " ".join(command)}
        if shutil.which(command[0]) is None:
            yield line | {"status": "missing", "seconds": 0.0, "reason": f"{command[0]} is not on this machine"}
            continue
        started = time.monotonic()
        status, reason = run(command, item, out / "first-light.log", environment)
        yield line | {"status": status, "seconds": time.monotonic() - started, "reason": reason}


def command_of(item: Item, out: Path, *, dry: bool) -> list[str]:
    """Return the command of an item; a dry run leaves out the program that it runs under."""
    command = [sys.executable, *(str(out) if argument == "OUT" else argument for argument in item.command)]
    if not dry:
        return [*item.under, *command]
    before, after = (list(arguments) for arguments in item.dry)
    for start in range(len(command)):
        if before and command[start : start + len(before)] == before:
            return [*command[:start], *after, *command[start + len(before) :]]
    return command


def run(command: list[str], item: Item, log: Path, environment: Mapping[str, str]) -> tuple[str, str]:
    """Run a command with its children in a session of its own, all of which is killed at the item's limit.

    Returns:
        Status and reason, see `lines`.
    """
    with log.open("a+b") as stream:
        stream.write(f"\n==== {item.name}: {' '.join(command)}\n".encode())
        stream.flush()
        begin = stream.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(item.seconds)
            status = "done" if code == 0 else "failed"
            ending = [f"exit code {code}"] if code else []
        except subprocess.TimeoutExpired:
            status, ending = "timed out", [f"stopped after {item.seconds:.0f} seconds"]
        finally:
            _kill(process)
        size = stream.seek(0, os.SEEK_END)
        stream.truncate(min(size, begin + LOG_BYTES))
        stream.seek(max(begin, min(size, begin + LOG_BYTES) - 4096))
        printed = stream.read().decode(errors="replace").strip().splitlines()
    return status, "\n".join([*ending, *printed[-REASON_LINES if ending else -1 :]])


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
