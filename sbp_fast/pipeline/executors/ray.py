"""The tasks of a stage on a Ray cluster, whose nodes see the same file system under the same paths and have this package.

Ray places tasks, starts them again when their process or node is lost, and brings back what they return. Files go by the file
system alone: Ray loses its objects with the driver, and a stage goes on from its files.
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
from sbp_fast.pipeline.executors.executor import Advance, Holders, Place, Result, Task, Tool
from sbp_fast.pipeline.files import name_temporaries

RETRIES = 3  # of a task whose process or node was lost; what it raises itself is not tried again
TASKS_PER_CPU = 2  # handed to Ray ahead of their results, so that no process waits for the driver
ANSWER_SECONDS = 10.0
END_SECONDS = 60.0  # that a node may take to end what was given up


@contextmanager
def connect(address: str) -> Iterator[RayWorkers]:
    """The cluster at "auto" (the one running on this machine, or RAY_ADDRESS), HOST:PORT or ray://HOST:PORT.

    Raises:
        UserError: none answers there, or one that this driver does not go with.
    """
    remedy = "start one (ray start --head), or correct the address"
    if address != "auto" and not _answers(address):
        raise UserError(f"--address {address}", "nothing answers there", remedy)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as error:
        found = f"no Ray cluster to work with: {(str(error).splitlines() or [type(error).__name__])[0]}"
        raise UserError(f"--address {address}", found, remedy) from None
    try:
        yield RayWorkers()
    finally:
        ray.shutdown()


def _answers(address: str) -> bool:
    """Whether anything listens at HOST:PORT; Ray itself would try for minutes."""
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
        """As `Workers.run`, a CPU for each task.

        Raises:
            TransientError: a process or node was lost again and again.
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
    def hold(self, make: Callable[[Place], Tool], config: RunConfig) -> Iterator[Holders[Tool]]:
        """As `Workers.hold`, by actors, which are started with the first task."""
        place, count, demands = spread(_nodes(), config.device, config.threads)
        holders = _Actors(make, place, count, demands)
        try:
            yield holders
        finally:
            holders.end()


def spread(nodes: Sequence[Mapping[str, float]], device: str, threads: int) -> tuple[Place, int, dict[str, float]]:
    """How many tools a cluster holds, where, and what Ray is to set aside for each.

    One for each GPU, with its share of the node's CPUs. Without GPUs, as many as fit of `threads` CPUs each, or one a node.

    Args:
        nodes: the resources of each.
        device: as in the configuration; "auto" takes GPUs if the cluster has any.
        threads: of each tool (0: all of a node, or of a GPU's share; the least of any node).

    Raises:
        UserError: a CUDA device, and no GPU in the cluster; no CPU at all.
    """
    cpus, gpus = _amounts(nodes, "CPU"), _amounts(nodes, "GPU")
    if device.startswith("cuda") and not sum(gpus):
        raise UserError(f"device = {device}", "the cluster has no GPU", "set it to auto, or to cpu")
    if device.startswith("cuda") or (device == "auto" and sum(gpus) > 0):
        share = min(cpu // gpu for cpu, gpu in zip(cpus, gpus, strict=True) if gpu)
        share = min(threads or share, share)
        return Place("cuda", max(1, share)), sum(gpus), {"num_gpus": 1, "num_cpus": share}
    if not sum(cpus):
        raise UserError("--engine ray", "the cluster has no CPU", "start its nodes with some: ray start --num-cpus")
    each = min(threads or min(filter(None, cpus)), max(cpus))
    return Place("cpu", each), sum(cpu // each for cpu in cpus), {"num_cpus": each}


class _Actors(Generic[Tool]):
    """Actors that each hold a tool."""

    def __init__(self, make: Callable[[Place], Tool], place: Place, count: int, demands: dict[str, float]) -> None:
        self.make = [ray.put(make)]  # inside a list Ray leaves it to be unpickled by the actor, once its process is ready
        self.place, self.count, self.demands = place, count, demands
        self.actors: list[Any] = []
        self.working: dict[Any, tuple[int, Any]] = {}
        """What was asked -> the number of the task, and the actor."""

    def run(
        self, function: Callable[[Tool, Task, Advance], Result], tasks: Sequence[Task], advance: Advance
    ) -> Iterator[Result]:
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
            self.actors += [actor_class.remote(os.getcwd(), self.place) for _ in range(wanted - len(self.actors))]

    def end(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        _wait_for_end(self.working)


class _Holder:
    """The class of an actor, which opens its tool at its first task."""

    def __init__(self, directory: str, place: Place) -> None:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does, before torch is imported
        _begin(directory)
        self.place, self.tool = place, None

    def work(self, make: list[Any], function: Callable[[Any, Task, Advance], Result], task: Task) -> tuple[Result, float]:
        """What the function returns, and the sum of what it advanced."""
        if self.tool is None:
            self.tool = ray.get(make[0])(self.place)
        amounts: list[float] = []
        return function(self.tool, task, amounts.append), sum(amounts)


def _perform(directory: str, function: Callable[[Task], Result], task: Task) -> Result:
    _begin(directory)
    return function(task)


def _begin(directory: str) -> None:
    """Make a worker's process fit for the driver's tasks: the same relative paths, no files in another's way."""
    os.chdir(directory)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
    # the tasks of a driver that was killed may go on for a moment beside those of the next one
    name_temporaries(uuid.uuid4().hex[:8])


def _nodes() -> list[Mapping[str, float]]:
    """The resources of each node that is there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _amounts(nodes: Sequence[Mapping[str, float]], kind: str) -> list[int]:
    return [int(node.get(kind, 0)) for node in nodes]


def _result(reference: Any) -> Any:
    """What a task returned.

    Raises:
        Exception: what the task raised, as it was.
        UserError: its node does not see a file, or has not this package.
        TransientError: its process or node was lost, and the retries with it.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FileNotFoundError):
            remedy = "let all nodes see the same file system under the same paths, and start the command in it"
            raise UserError(error.cause.filename, "is not there on a node of the cluster", remedy) from error
        if isinstance(error.cause, ray.exceptions.RaySystemError):  # could not be unpickled
            found = f"a node does not know what to do: {str(error.cause).splitlines()[0]}"
            raise UserError("--engine ray", found, "install the same version of sbp-fast on all nodes") from error
        raise error.cause from error
    except ray.exceptions.RayError as error:
        found = f"a task was lost {RETRIES + 1} times: {(str(error).splitlines() or [''])[0]}"
        raise TransientError(
            "--engine ray", found, "see to the cluster (memory?) and rerun, it goes on where it stopped"
        ) from error


def _wait_for_end(references: Iterable[Any]) -> None:
    """Come back when nothing of what was given up is at work: the caller may clear away what it wrote."""
    given_up = list(references)
    if given_up:
        ray.wait(given_up, num_returns=len(given_up), timeout=END_SECONDS)
