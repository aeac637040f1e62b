"""Executor that runs tasks in processes of this machine, which end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Generic

from sbp_fast.config import RunConfig, resolve_device, resolve_threads
from sbp_fast.errors import TransientError
from sbp_fast.pipeline.executors.executor import Advance, Holders, Placement, Result, Task, Tool
from sbp_fast.pipeline.interrupts import end_with_parent


class LocalWorkers:
    """A pool of processes for tasks; tools are held in this process, one at a time."""

    local = True

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[Result]:
        """Run tasks (see `Workers.run`); a single task, or all tasks of a single process, run in this process.

        Raises:
            TransientError: a worker was killed.
        """
        if processes == 1 or len(tasks) <= 1:
            yield from map(function, tasks)
            return
        others = set(multiprocessing.active_children())
        size, spawn = min(processes, len(tasks)), multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(size, spawn, initializer=_begin_worker)
        try:
            for future in [pool.submit(function, task) for task in tasks]:
                yield future.result()
        except BaseException as error:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            pool.shutdown(cancel_futures=True)  # waits for them: the caller removes their files next
            if isinstance(error, BrokenProcessPool):
                problem = "one was killed, most likely for want of memory"
                remedy = "rerun: it resumes where it stopped; lower threads (for prepare, corpus.workers) if that happens again"
                raise TransientError("worker processes", problem, remedy) from None
            raise
        pool.shutdown()

    @contextmanager
    def hold(self, make: Callable[[Placement], Tool], config: RunConfig) -> Iterator[Holders[Tool]]:
        """Yield this process as the only holder."""
        yield _Here(make, Placement(resolve_device(config), resolve_threads(config)))


LOCAL = LocalWorkers()


class _Here(Generic[Tool]):
    """This process, holding a tool."""

    count = 1

    def __init__(self, make: Callable[[Placement], Tool], placement: Placement) -> None:
        self.make, self.placement = make, placement
        self.tool: Tool | None = None

    def run(
        self, function: Callable[[Tool, Task, Advance], Result], tasks: Sequence[Task], advance: Advance
    ) -> Iterator[Result]:
        for task in tasks:
            if self.tool is None:
                self.tool = self.make(self.placement)
            yield function(self.tool, task, advance)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles an interrupt from the keyboard
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    end_with_parent()
