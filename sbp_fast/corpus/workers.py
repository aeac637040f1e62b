"""Tasks in parallel processes, which end with the process that began them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Yield the result of each task, in order; in this process where there is but one task or worker.

    What a task raises is raised here, the first task's first, and the tasks not yet done are given up.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a worker was killed.
    """
    if workers == 1 or len(tasks) <= 1:
        yield from map(function, tasks)
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(workers, len(tasks)), multiprocessing.get_context("spawn"), initializer=_begin_worker)
    try:
        for future in [pool.submit(function, task) for task in tasks]:
            yield future.result()
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)  # waits for them: none may still write what the caller now clears away
        raise
    pool.shutdown()


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the keyboard is the parent's to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this a worker would go on writing after its parent was killed, beside the workers of the next attempt."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
