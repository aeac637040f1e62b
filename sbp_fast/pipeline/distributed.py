"""The processes of one training run: who they are, how they are started, and how they agree.

A process started by torchrun, or by `run_in_processes` here, finds its number in the environment and joins the others; any
other is alone. Process 0 leads: it keeps the stage's directory, speaks, and tells the others whether there is work.
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

FIRST_STEP_MINUTES = 30  # compilation and the first checkpoint of a large model take their time


@dataclass(frozen=True)
class Processes:
    """This process among the others.

    Attributes:
        rank: its number.
        world: how many there are.
        device: where it computes.
        group: for agreements among hosts; None where it is alone.
        checkpoint_group: the same, for the thread that writes checkpoints.
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    checkpoint_group: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def most(self, *values: float) -> list[float]:
        """The greatest of each value among all processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all processes."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.world == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, operation, group=self.group)
        return numbers.tolist()

    def tell(self, message: Any = None) -> Any:
        """What process 0 says, to all."""
        if self.world == 1:
            return message
        box = [message]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, message: Any) -> list[Any]:
        """What each process says, to all."""
        if self.world == 1:
            return [message]
        box = [None] * self.world
        dist.all_gather_object(box, message, group=self.group)
        return box


def world_size() -> int:
    """How many processes this one belongs to."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this is process 0, or alone."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str, *, group_of_one: bool = False) -> Iterator[Processes]:
    """Take part in the run that the environment describes, or be alone.

    Args:
        device: a torch device; of "cuda", each process on a machine takes the one of its local number.
        group_of_one: make a process group for a process that is alone too, as sharded weights need.
    """
    world, rank = world_size(), int(os.environ.get("RANK", "0"))
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", place.index or 0)))
        torch.cuda.set_device(place)
    if world == 1 and not group_of_one:
        yield Processes(0, 1, place)
        return
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    timeout = timedelta(minutes=FIRST_STEP_MINUTES)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = [dist.new_group(backend="gloo", timeout=timeout) for _ in range(2)]
        yield Processes(rank, world, place, *groups)
    finally:
        dist.destroy_process_group()


def run_in_processes(function: Callable[..., Any], *arguments: Any, gpus: int, console: Console, **options: Any) -> Any:
    """Call a stage's function here, or in `gpus` processes of this machine by torch's elastic launcher.

    Args:
        function: takes `console` besides `arguments` and `options`; it and they can be pickled. Its first argument is the
            configuration, which names the device.
        gpus: 1 calls it here, as does being one of several processes already (under torchrun).
        console: what this process prints to; of several processes rank 0 prints.

    Returns:
        What the function returns; None where other processes ran it.

    Raises:
        UserError: more processes than CUDA devices.
        SystemExit: one of the processes failed, and has said why; the code is that of the first that did.
    """
    if gpus == 1 or world_size() > 1:
        return function(*arguments, console=Console(quiet=True) if not leads() else console, **options)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if resolve_device(arguments[0]).startswith("cuda") and gpus > torch.cuda.device_count():
        problem = f"asks for {gpus} processes, and there are {torch.cuda.device_count()} CUDA devices"
        raise UserError(f"--gpus {gpus}", problem, "ask for as many as there are, or set device=cpu")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its report of a failure buries the reason
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
    console = Console(quiet=not leads())
    try:
        function(*arguments, console=console, **options)
    except UserError as error:
        if leads():  # of several processes that meet the same mistake one says so
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Stopped as stopped:
        console.say(str(stopped))
        sys.exit(stopped.exit_code)


class Stopped(Exception):
    """A run was asked to stop, and has saved itself after `steps` steps."""

    def __init__(self, signal_number: int, steps: int) -> None:
        super().__init__(f"stopped after {steps} steps, which are saved: the same command goes on from here")
        self.exit_code = 128 + signal_number


class StopRequest:
    """Remembers SIGTERM and SIGINT while it is entered, so that a run can end between two steps.

    Attributes:
        asked: the number of the signal that this process was sent, or 0.
        agreed: the same of any process, once all know of it.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread: whoever runs that one has its own way to stop
                break
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.asked:  # asked twice: at once
            raise KeyboardInterrupt
        self.asked = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def led(processes: Processes, lead: Callable[[Callable[[Any], None]], Any], follow: Callable[[Any], None]) -> Any:
    """Process 0 calls `lead(announce)`; each other one waits for what it announces and calls `follow` with it, if anything.

    Whether process 0 finds its work done or fails before it begins, the others end with it.
    """
    if not processes.leads:
        plan = processes.tell()
        if plan is not None:
            follow(plan)
        return None
    announced = False

    def announce(plan: Any) -> None:
        nonlocal announced
        announced = True
        processes.tell(plan)

    try:
        return lead(announce)
    finally:
        if not announced:
            processes.tell(None)
