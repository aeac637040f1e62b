"""What does the tasks of a stage: processes of this machine (`local.py`) or a Ray cluster (`cluster.py`).

A task is a function of a module and an argument, both picklable. It writes its files atomically, returns little, and may be
done again: whoever does it, the files are the same. What a stage wrote, and not what its workers say, is what a killed stage
goes on from.
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
"""Called with what was done since the last call."""


@dataclass(frozen=True)
class Place:
    """Where a tool is held: a torch device, and how many threads its CPU operations may use."""

    device: str
    threads: int


class Holders(Protocol[Tool_co]):
    """Processes that each hold a tool that takes long to open, such as a model.

    Attributes:
        place: of each.
        count: how many there are at most.
    """

    @property
    def place(self) -> Place: ...

    @property
    def count(self) -> int: ...

    def run(
        self, function: Callable[[Tool_co, Task, Advance], Result], tasks: Sequence[Task], advance: Advance
    ) -> Iterator[Result]:
        """Yield what `function(tool, task, advance)` returns for each task, in order; the first task opens the tool.

        No two holders are given the same task. What one raises is raised here, without waiting for the others.
        """
        ...


class Workers(Protocol):
    """Who does the tasks of the data stages.

    Attributes:
        local: whether tools are held in this process.
    """

    @property
    def local(self) -> bool: ...

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[Result]:
        """Yield what `function(task)` returns for each task, in order.

        What a task raises is raised here, the first task's first. The tasks not yet done are then given up, and none of them
        writes any more.

        Args:
            processes: of this machine, at most; a cluster has its own number.
        """
        ...

    def hold(self, make: Callable[[Place], Tool], config: RunConfig) -> AbstractContextManager[Holders[Tool]]:
        """Processes that each hold what `make` returns, until the context is left.

        Args:
            config: its `device` and `threads` decide the places.

        Raises:
            UserError: a device that is not there.
        """
        ...
