"""The processes of one run: how they start, join a process group, exchange values and stop together.

A process started by torchrun, or by `run_in_processes` here, finds its rank in the environment and joins the others; any
other process works alone. Rank 0 writes the stage's directory, prints, and broadcasts to the others whether there is work.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from sbp_fast.config import resolve_device
from sbp_fast.errors import UserError
from sbp_fast.pipeline.progress import Console

GROUP_TIMEOUT_MINUTES = 30  # compiling and the first checkpoint of a large model take long


@dataclass(frozen=True)
class Processes:
    """This process's rank, device and process groups.

    Attributes:
        rank: rank of this process, from 0.
        world: number of processes.
        device: device that this process computes on.
        group: Gloo group for values on the host; None for a process without a process group.
        checkpoint_group: a second Gloo group, for the thread that writes checkpoints.
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    checkpoint_group: dist.ProcessGroup | None = None

    @property
    def is_rank0(self) -> bool:
        """Whether this process is rank 0, which alone writes and prints."""
        return self.rank == 0

    def max(self, *values: float) -> list[float]:
        """Return the maximum of each value over all processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.world == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, operation, group=self.group)
        return numbers.tolist()

    def broadcast(self, message: Any = None) -> Any:
        """Return rank 0's `message` on every process."""
        if self.world == 1:
            return message
        box = [message]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, message: Any) -> list[Any]:
        """Return the messages of all processes, in order of rank, on every process."""
        if self.world == 1:
            return [message]
        box = [None] * self.world
        dist.all_gather_object(box, message, group=self.group)
        return box


def world_size() -> int:
    """Return the number of processes that the environment declares: 1 outside torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank0() -> bool:
    """Return whether the environment makes this process rank 0; true outside torchrun."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join_processes(device: str, *, group_of_one: bool = False) -> Iterator[Processes]:
    """Join the process group that the environment describes; outside torchrun, work alone.

    Args:
        device: a torch device; with "cuda" each process takes the device of its local rank.
        group_of_one: create a process group for a single process too, which sharded weights need.
    """
    world, rank = world_size(), int(os.environ.get("RANK", "0"))
    torch_device = torch.device(device)
    if torch_device.type == "cuda":
        torch_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch_device.index or 0)))
        torch.cuda.set_device(torch_device)
    if world == 1 and not group_of_one:
        yield Processes(0, 1, torch_device)
        return
    backend = "cpu:gloo,cuda:nccl" if torch_device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=GROUP_TIMEOUT_MINUTES)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = [dist.new_group(backend="gloo", timeout=timeout) for _ in range(2)]
        yield Processes(rank, world, torch_device, *groups)
    finally:
        dist.destroy_process_group()


def run_in_processes(function: Callable[..., Any], *arguments: Any, gpus: int, console: Console, **options: Any) -> Any:
    """Call a stage's function in this process, or in `gpus` processes of this machine with torch's elastic launcher.

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
        SystemExit: a process failed, and has printed the reason; the code is that of the first one that failed.
    """
    if gpus == 1 or world_size() > 1:
        return function(*arguments, console=Console(quiet=True) if not is_rank0() else console, **options)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if resolve_device(arguments[0]).startswith("cuda") and gpus > torch.cuda.device_count():
        problem = f"asks for {gpus} processes, and there are {torch.cuda.device_count()} CUDA devices"
        raise UserError(f"--gpus {gpus}", problem, "ask for as many as there are, or set device=cpu")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its long report of a failure hides the reason
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=gpus,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        start_method="spawn",
    )
    try:
        elastic_launch(launch, _run_as_one_of_several)(function, arguments, options)
    except ChildFailedError as failed:
        raise SystemExit(next(iter(failed.failures.values())).exitcode) from None
    return None


def _run_as_one_of_several(function: Callable[..., Any], arguments: Sequence[Any], options: dict[str, Any]) -> None:
    console = Console(quiet=not is_rank0())
    try:
        function(*arguments, console=console, **options)
    except UserError as error:
        if is_rank0():  # all processes raise the same error; one of them prints it
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Stopped as stopped:
        console.say(str(stopped))
        sys.exit(stopped.exit_code)


class Stopped(Exception):
    """Raised after SIGTERM or SIGINT, once a checkpoint of the first `steps` steps is saved."""

    def __init__(self, signal_number: int, steps: int) -> None:
        super().__init__(f"stopped after {steps} steps, which are saved: the same command resumes from here")
        self.exit_code = 128 + signal_number


class StopRequest:
    """A context manager that records SIGTERM and SIGINT, so that a run can end between two steps.

    A second signal raises KeyboardInterrupt at once.

    Attributes:
        signal_number: number of the signal that this process received, or 0.
        agreed_signal: number of the signal that any process received, once all processes have exchanged it; 0 before.
    """

    def __init__(self) -> None:
        self.signal_number = self.agreed_signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._remember)
            except ValueError:  # only the main thread may set handlers; in other threads the caller stops the run
                break
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run_on_rank0(processes: Processes, rank0: Callable[[Callable[[Any], None]], Any], others: Callable[[Any], None]) -> Any:
    """Run `rank0(announce)` on rank 0, and `others(plan)` on the other ranks with the plan that rank 0 announces.

    Where rank 0 announces nothing, because its work is done already or it fails first, `others` is not called.

    Args:
        processes: this process and its process groups.
        rank0: does the work of rank 0; it calls `announce(plan)` at most once, when the other ranks are to join.
        others: takes part in the work on the other ranks.

    Returns:
        What `rank0` returned; None on the other ranks.
    """
    if not processes.is_rank0:
        plan = processes.broadcast()
        if plan is not None:
            others(plan)
        return None
    announced = False

    def announce(plan: Any) -> None:
        nonlocal announced
        announced = True
        processes.broadcast(plan)

    try:
        return rank0(announce)
    finally:
        if not announced:
            processes.broadcast(None)
