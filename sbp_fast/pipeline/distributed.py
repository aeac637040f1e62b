"""The processes of one run: how they join a process group and exchange values.

A process started by torchrun, or by `launcher.py`, finds its rank in the environment and joins the others; any other process
works alone. Rank 0 writes the stage's directory, prints, and broadcasts to the others whether there is work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sbp_fast.pipeline.launcher import RENDEZVOUS, world_size

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
    if RENDEZVOUS in os.environ:
        store = dist.FileStore(os.environ[RENDEZVOUS], world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = [dist.new_group(backend="gloo", timeout=timeout) for _ in range(2)]
        yield Processes(rank, world, torch_device, *groups)
    finally:
        dist.destroy_process_group()


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
