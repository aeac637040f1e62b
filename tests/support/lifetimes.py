"""Commands that run until a signal: python lifetimes.py ranks|threads|blocked FOLDER."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sbp_fast.cli import run_command
from sbp_fast.config import RunConfig
from sbp_fast.pipeline import interrupts
from sbp_fast.pipeline.launcher import run_in_processes
from sbp_fast.pipeline.output import locked
from sbp_fast.pipeline.progress import Console


def write_for_ever(file: Path) -> None:
    while True:
        with open(file, "ab") as log:
            log.write(b".")
        time.sleep(0.01)


def rank(config: RunConfig, folder: Path, console: Console) -> None:
    """Write, as one of several processes, until a signal."""
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    write_for_ever(folder / f"log-{os.environ['RANK']}")


def ranks(folder: Path) -> None:
    run_in_processes(rank, RunConfig(device="cpu"), folder, gpus=2, console=Console())


def threads(folder: Path) -> None:
    """Wait for a thread that takes no notice of anything, with the lock of an output."""
    with locked(folder / "out"), ThreadPoolExecutor(1) as pool:
        (folder / "pid-0").write_text(str(os.getpid()))
        pool.submit(write_for_ever, folder / "log-0").result()


def blocked(folder: Path) -> None:
    """Keep the main thread in a call in which Python runs no handlers, with the lock of an output."""
    lock = threading.Lock()
    with locked(folder / "out"), lock:
        (folder / "pid-0").write_text(str(os.getpid()))
        while True:
            try:
                write_for_ever(folder / "log-0")
            except interrupts.Interrupted:
                continue


if __name__ == "__main__":
    interrupts.GRACE_SECONDS = 1.0
    run_command(lambda: globals()[sys.argv[1]](Path(sys.argv[2])))
