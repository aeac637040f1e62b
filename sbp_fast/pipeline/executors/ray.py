"""Executor that runs tasks on a Ray cluster, whose nodes share a file system under the same paths and have this package.

Ray schedules tasks, restarts them when their process or node is lost, and returns their results. Data is exchanged only through
files: Ray loses its objects with the driver, and a stage resumes from its files.
"""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic
from urllib.parse import urlsplit

import ray

from sbp_fast.config import RunConfig
from sbp_fast.errors import TransientError, UserError
from sbp_fast.pipeline.executors.executor import Advance, Holders, Placement, Result, Task, Tool
from sbp_fast.pipeline.files import name_temporaries

RETRIES = 3  # of a task whose process or node was lost; an exception of the task itself is not retried
TASKS_PER_CPU = 2  # submitted ahead of their results, so that no process waits for the driver
ANSWER_SECONDS = 10.0
END_SECONDS = 60.0  # that a node may take to end cancelled tasks


@contextmanager
def connect(address: str) -> Iterator[RayWorkers]:
    """Connect to the cluster at "auto" (the one running on this machine, or RAY_ADDRESS), HOST:PORT or ray://HOST:PORT.

    Raises:
        UserError: no cluster answers there, or it does not accept this driver.
    """
    remedy = "start one (ray start --head), or correct the address"
    if address != "auto" and not _answers(address):
        raise UserError(f"--address {address}", "nothing answers there", remedy)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as error:
        problem = f"no usable Ray cluster: {(str(error).splitlines() or [type(error).__name__])[0]}"
        raise UserError(f"--address {address}", problem, remedy) from None
    try:
        yield RayWorkers()
    finally:
        ray.shutdown()


def _answers(address: str) -> bool:
    """Return whether anything listens at HOST:PORT; Ray itself would try for minutes."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        with socket.create_connection((parts.hostname or "", parts.port or 0), ANSWER_SECONDS):
            return True
    except (OSError, ValueError):
        return False


class RayWorkers:
    """The cluster that this process is connected to."""

    local = False

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[Result]:
        """Run tasks (see `Workers.run`) with one CPU each.

        Raises:
            TransientError: a process or node was lost more often than a task is retried.
        """
        remote = ray.remote(_perform).options(num_cpus=1, max_retries=RETRIES)
        most = max(1, TASKS_PER_CPU * sum(_amounts(_nodes(), "CPU")))
        waiting: deque[Any] = deque()
        try:
            for task in tasks:
                waiting.append(remote.remote(os.getcwd(), function, task))
                if len(waiting) >= most:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
            _wait_for_end(waiting)

    @contextmanager
    def hold(self, make: Callable[[Placement], Tool], config: RunConfig) -> Iterator[Holders[Tool]]:
        """Yield actors that hold tools (see `Workers.hold`); they are started with the first task."""
        placement, count, demands = spread(_nodes(), config.device, config.threads)
        holders = _Actors(make, placement, count, demands)
        try:
            yield holders
        finally:
            holders.end()


def spread(nodes: Sequence[Mapping[str, float]], device: str, threads: int) -> tuple[Placement, int, dict[str, float]]:
    """Return the placement of tools on a cluster, their number, and the resources that Ray reserves for each.

    There is one tool for each GPU, with its share of the node's CPUs. Without GPUs, there are as many as fit with `threads`
    CPUs each, or one a node.

    Args:
        nodes: resources of each node.
        device: as in the configuration; "auto" takes GPUs if the cluster has any.
        threads: CPUs of each tool (0: all of the smallest node, or a GPU's share of them).

    Raises:
        UserError: the device is CUDA and the cluster has no GPU; the cluster has no CPU.
    """
    cpus, gpus = _amounts(nodes, "CPU"), _amounts(nodes, "GPU")
    if device.startswith("cuda") and not sum(gpus):
        raise UserError(f"device = {device}", "the cluster has no GPU", "set it to auto, or to cpu")
    if device.startswith("cuda") or (device == "auto" and sum(gpus) > 0):
        share = min(cpu // gpu for cpu, gpu in zip(cpus, gpus, strict=True) if gpu)
        share = min(threads or share, share)
        return Placement("cuda", max(1, share)), sum(gpus), {"num_gpus": 1, "num_cpus": share}
    if not sum(cpus):
        raise UserError("--engine ray", "the cluster has no CPU", "start its nodes with some: ray start --num-cpus")
    each = min(threads or min(filter(None, cpus)), max(cpus))
    return Placement("cpu", each), sum(cpu // each for cpu in cpus), {"num_cpus": each}


class _Actors(Generic[Tool]):
    """Actors that each hold a tool."""

    def __init__(self, make: Callable[[Placement], Tool], placement: Placement, count: int, demands: dict[str, float]) -> None:
        self.make = [ray.put(make)]  # in a list, so that the actor unpickles it when its process is ready
        self.placement, self.count, self.demands = placement, count, demands
        self.actors: list[Any] = []
        self.working: dict[Any, tuple[int, Any]] = {}
        """Reference of a running task -> (index of the task, its actor)."""

    def run(
        self, function: Callable[[Tool, Task, Advance], Result], tasks: Sequence[Task], advance: Advance
    ) -> Iterator[Result]:
        """Run tasks (see `Holders.run`)."""
        self._start(min(len(tasks), self.count))
        left, idle, done, given = deque(enumerate(tasks)), list(self.actors), dict[int, Result](), 0
        while left or self.working:
            while left and idle:
                number, task = left.popleft()
                actor = idle.pop(0)
                self.working[actor.work.remote(self.make, function, task)] = number, actor
            (ready, *_), _ = ray.wait(list(self.working))
            number, actor = self.working.pop(ready)
            done[number], amount = _result(ready)
            idle.append(actor)
            advance(amount)
            while given in done:
                yield done.pop(given)
                given += 1

    def _start(self, wanted: int) -> None:
        if len(self.actors) < wanted:
            actor_class = ray.remote(_Holder).options(max_restarts=RETRIES, max_task_retries=RETRIES, **self.demands)
            self.actors += [actor_class.remote(os.getcwd(), self.placement) for _ in range(wanted - len(self.actors))]

    def end(self) -> None:
        """Kill the actors and wait until they have ended."""
        for actor in self.actors:
            ray.kill(actor)
        _wait_for_end(self.working)


class _Holder:
    """Class of an actor; it opens its tool at its first task."""

    def __init__(self, directory: str, placement: Placement) -> None:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does, before torch is imported
        _begin(directory)
        self.placement, self.tool = placement, None

    def work(self, make: list[Any], function: Callable[[Any, Task, Advance], Result], task: Task) -> tuple[Result, float]:
        """Return the function's result, and the sum of the amounts that it reported."""
        if self.tool is None:
            self.tool = ray.get(make[0])(self.placement)
        amounts: list[float] = []
        return function(self.tool, task, amounts.append), sum(amounts)


def _perform(directory: str, function: Callable[[Task], Result], task: Task) -> Result:
    _begin(directory)
    return function(task)


def _begin(directory: str) -> None:
    """Set up a worker's process for the driver's tasks: the same working directory, and unique names of temporary files."""
    os.chdir(directory)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
    # the tasks of a killed driver may run for a moment beside those of the next one
    name_temporaries(uuid.uuid4().hex[:8])


def _nodes() -> list[Mapping[str, float]]:
    """Return the resources of each live node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _amounts(nodes: Sequence[Mapping[str, float]], kind: str) -> list[int]:
    return [int(node.get(kind, 0)) for node in nodes]


def _result(reference: Any) -> Any:
    """Return the result of a task.

    Raises:
        Exception: the exception that the task raised.
        UserError: the node does not see a file, or does not have this package.
        TransientError: the process or node was lost in every retry.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FileNotFoundError):
            remedy = "let all nodes see the same file system under the same paths, and start the command in it"
            raise UserError(error.cause.filename, "is not there on a node of the cluster", remedy) from error
        if isinstance(error.cause, ray.exceptions.RaySystemError):  # could not be unpickled
            problem = f"a node cannot load the task: {str(error.cause).splitlines()[0]}"
            raise UserError("--engine ray", problem, "install the same version of sbp-fast on all nodes") from error
        raise error.cause from error
    except ray.exceptions.RayError as error:
        problem = f"a task was lost {RETRIES + 1} times: {(str(error).splitlines() or [''])[0]}"
        raise TransientError(
            "--engine ray", problem, "check the cluster (its memory) and rerun: it resumes where it stopped"
        ) from error


def _wait_for_end(references: Iterable[Any]) -> None:
    """Wait until no cancelled task runs any more, so that the caller may remove its files."""
    cancelled = list(references)
    if cancelled:
        ray.wait(cancelled, num_returns=len(cancelled), timeout=END_SECONDS)
