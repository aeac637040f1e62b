"""Several processes of this machine that run one function together, such as those of `--gpus`; they end with this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from sbp_fast.config import resolve_device
from sbp_fast.errors import TransientError, UserError
from sbp_fast.pipeline.interrupts import Interrupted, Stopped, end, end_with_parent, watch_signals, without_deadline
from sbp_fast.pipeline.progress import Console, print_error

RENDEZVOUS = "SBP_FAST_RENDEZVOUS"
"""Environment variable: file by which the processes that `launcher.py` started find each other; torchrun has an address."""
POLL_SECONDS = 0.1
FAILURE_SECONDS = 10.0  # that the other processes have to end by themselves after one has failed


def world_size() -> int:
    """Return the number of processes that the environment declares: 1 outside torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank0() -> bool:
    """Return whether the environment makes this process rank 0; true outside torchrun."""
    return os.environ.get("RANK", "0") == "0"


def run_in_processes(function: Callable[..., Any], *arguments: Any, gpus: int, console: Console, **options: Any) -> Any:
    """Call a stage's function in this process, or in `gpus` processes of this machine.

    Args:
        function: takes `console` besides `arguments` and `options`. All of them can be pickled.
        arguments: positional arguments; the first is the configuration, which names the device.
        gpus: number of processes. With 1, and under torchrun, the function is called in this process.
        console: where this process prints; of several processes rank 0 prints.
        options: keyword arguments.

    Returns:
        What the function returns; None where other processes ran it.

    Raises:
        UserError: there are fewer CUDA devices than processes.
        TransientError: a process was killed.
        SystemExit: a process failed or was stopped, and has printed the reason; the code is that of the first one that ended.
    """
    if gpus == 1 or world_size() > 1:
        return function(*arguments, console=Console(quiet=True) if not is_rank0() else console, **options)
    if resolve_device(arguments[0]).startswith("cuda") and gpus > _cuda_devices():
        problem = f"asks for {gpus} processes, and there are {_cuda_devices()} CUDA devices"
        raise UserError(f"--gpus {gpus}", problem, "ask for as many as there are, or set device=cpu")
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="sbp-fast-") as folder:
        store = Path(folder) / "rendezvous"
        output = _Output(console.verbose, console.prefix, console.title, spawn.Event(), spawn.Event())
        processes = [
            spawn.Process(target=_run_as_rank, args=(rank, gpus, store, output, function, arguments, options))
            for rank in range(gpus)
        ]
        try:
            for process in processes:
                process.start()
            while not output.wanted.wait(POLL_SECONDS) and all(process.is_alive() for process in processes):
                continue
            with console.bar_hidden():
                output.given.set()
                code = _wait(processes)
        except Interrupted as interrupted:
            stop(processes)
            raise SystemExit(interrupted.exit_code) from None
        except BaseException:
            kill(processes)
            raise
    if code < 0:
        problem = f"a process was killed by signal {-code}" + ", most likely for want of memory" * (code == -signal.SIGKILL)
        raise TransientError(f"--gpus {gpus}", problem, "rerun: it resumes where it stopped")
    if code:
        raise SystemExit(code)
    return None


@dataclass(frozen=True)
class _Output:
    """What rank 0 needs in order to print in place of the process that started it.

    Attributes:
        verbose: as of that process's console.
        prefix: as of that process's console.
        title: of that process's bar.
        wanted: set by rank 0 once it could show a bar of its own.
        given: set once the other bar is hidden.
    """

    verbose: bool
    prefix: str
    title: str
    wanted: Event
    given: Event

    @contextmanager
    def open(self, rank: int) -> Iterator[Console]:
        """Yield the console of a rank; that of rank 0 shows a bar as soon as the other one is hidden."""
        console = Console(quiet=rank > 0, verbose=self.verbose)
        console.prefix = self.prefix
        if rank == 0:
            self.wanted.set()
            self.given.wait()
        with console.bar(self.title):
            yield console


def _cuda_devices() -> int:
    import torch  # here, because it takes seconds, and this process may not need it

    return torch.cuda.device_count()


def _wait(processes: Sequence[BaseProcess]) -> int:
    """Wait for all processes; return the exit code of the first that failed, after the others have ended, too, or 0."""
    running, code, deadline = {process.sentinel: process for process in processes}, 0, float("inf")
    while running:
        for sentinel in wait(list(running), None if deadline == float("inf") else max(0.0, deadline - time.monotonic())):
            process = running.pop(sentinel)  # type: ignore[arg-type]
            process.join()
            if process.exitcode and not code:
                code = process.exitcode
                deadline = time.monotonic() + (FAILURE_SECONDS if code > 0 else 0)  # all raise the same UserError
        if time.monotonic() >= deadline:
            kill(processes)
    return code


def stop(processes: Sequence[BaseProcess]) -> None:
    """Pass the signal on, and wait until all processes have ended; a training run saves a checkpoint first."""
    with without_deadline():
        for process in processes:
            if process.pid is not None:
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()


def kill(processes: Sequence[BaseProcess]) -> None:
    """Kill processes, those that have not started excepted, and wait for their end."""
    for process in processes:
        if process.pid is not None:
            process.kill()
            process.join()


def _run_as_rank(
    rank: int,
    world: int,
    store: Path,
    output: _Output,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    options: dict[str, Any],
) -> None:
    """Run the function as one of several processes, which find each other by a file and talk on this machine alone."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ[RENDEZVOUS] = str(store)
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback)
    # All processes raise the same error, and all are stopped together; one of them prints it.

    def run() -> None:
        with output.open(rank) as console:
            function(*arguments, console=console, **options)

    run_as_child(run, quiet=rank > 0)


def run_as_child(function: Callable[[], object], *, quiet: bool) -> None:
    """Run a function in a process that ends with the one that started it, and in which SIGTERM does what `interrupts` says.

    A user's mistake ends the process with exit code 2.

    Args:
        function: what to run.
        quiet: print neither an error nor that it was stopped.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keyboard reaches all processes; the parent passes on one SIGTERM
    with watch_signals([signal.SIGTERM], quiet=True):
        try:
            function()
        except UserError as error:
            if not quiet:
                print_error(error)
            sys.exit(2)
        except Stopped as stopped:
            Console(quiet=quiet).say(str(stopped))
            sys.stdout.flush()
            end(stopped.exit_code, "")
        except Interrupted as interrupted:
            end(interrupted.exit_code, "" if quiet else str(interrupted))
