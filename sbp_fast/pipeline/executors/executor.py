"""Interfaces of the executors that run a stage's tasks: processes of this machine (`local.py`) or a Ray cluster (`ray.py`).

A task is a module-level function and an argument, both picklable. It writes its files atomically, returns little, and may run
again: its files are the same wherever it runs. A killed stage resumes from its files, not from what workers returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sbp_fast.config import RunConfig

Task = TypeVar("Task")
Result = TypeVar("Result")
Tool = TypeVar("Tool")
Tool_co = TypeVar("Tool_co", covariant=True)
Advance = Callable[[float], object]
"""Callback that receives the amount of work done since its last call."""


@dataclass(frozen=True)
class Placement:
    """Resources of a tool: a torch device, and the number of threads that its CPU operations may use."""

    device: str
    threads: int


class Holders(Protocol[Tool_co]):
    """Processes that each hold a tool that takes long to open, such as a model.

    Attributes:
        placement: resources of each process's tool.
        count: largest number of processes.
    """

    @property
    def placement(self) -> Placement:
        """Resources of each process's tool."""
        ...

    @property
    def count(self) -> int:
        """Largest number of processes."""
        ...

    def run(
        self, function: Callable[[Tool_co, Task, Advance], Result], tasks: Sequence[Task], advance: Advance
    ) -> Iterator[Result]:
        """Yield the result of `function(tool, task, advance)` for each task, in order; the first task opens the tool.

        Each task runs in one holder. An exception of a task is raised here, without waiting for the others.

        Args:
            function: runs one task with the tool.
            tasks: arguments of the function.
            advance: called with the amounts of work that the tasks report.
        """
        ...


class Workers(Protocol):
    """Executor of the tasks of the data stages.

    Attributes:
        local: whether tools are held in this process.
    """

    @property
    def local(self) -> bool:
        """Whether tools are held in this process."""
        ...

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[Result]:
        """Yield the result of `function(task)` for each task, in order.

        The exception of the first task that fails, in order, is raised here. By then unfinished tasks are cancelled, and none
        of them writes any more.

        Args:
            function: runs one task.
            tasks: arguments of the function.
            processes: largest number of processes on this machine; a cluster has a number of its own.
        """
        ...

    def hold(self, make: Callable[[Placement], Tool], config: RunConfig) -> AbstractContextManager[Holders[Tool]]:
        """Return a context manager of processes that each hold a tool.

        Args:
            make: opens a tool.
            config: its `device` and `threads` decide the placement.

        Raises:
            UserError: the device does not exist.
        """
        ...
