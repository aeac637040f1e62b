"""Stages of an experiment side by side: each runs in one of several processes as soon as its inputs are finished.

Operations of small models gain little from a second thread, so that several stages with a thread each end sooner than one stage
after another with all threads (docs/log.md).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from sbp_fast.config import RunConfig, resolve_device, resolve_threads
from sbp_fast.errors import TransientError, UserError
from sbp_fast.experiment.graph import Stage, needed_stages, stages_of
from sbp_fast.pipeline.interrupts import Interrupted
from sbp_fast.pipeline.launcher import kill, run_as_child, stop
from sbp_fast.pipeline.progress import Console, Task


@dataclass(frozen=True)
class Share:
    """What a process needs to run stages of an experiment.

    Attributes:
        config: of the run, with this process's share of the threads.
        out: the run's directory.
        force: replace outputs that were made from other settings or inputs.
        quiet: print nothing.
        verbose: print technical details, too.
        relayed: let the process that started this one print, because a bar is on its terminal.
    """

    config: RunConfig
    out: Path
    force: bool
    quiet: bool
    verbose: bool
    relayed: bool

    def run(self, connection: Connection) -> None:
        """Run the stages whose names come through a connection, until None comes.

        Each is answered with its error or None; before that, if lines are relayed, with each line.
        """
        stages = stages_of(self.config)
        console = Console(quiet=self.quiet, force_plain=True, verbose=self.verbose)
        if self.relayed:
            console = _Relay(connection, self.verbose)
        while (name := connection.recv()) is not None:
            try:
                run_stage(stages, name, self.out, console, force=self.force)
            except UserError as error:
                connection.send(error)
            else:
                connection.send(None)


class _Relay(Console):
    """A console whose lines another process prints; of tasks it prints nothing, as that process has a bar."""

    def __init__(self, connection: Connection, verbose: bool) -> None:
        super().__init__(quiet=True, verbose=verbose)
        self.connection = connection

    def say(self, text: str) -> None:
        """Send a line, after the name of the current stage."""
        self.connection.send(f"{self.prefix}{text}")

    @contextmanager
    def task(self, description: str, total: float, unit: str, done: float = 0) -> Iterator[Task]:
        """Yield a task whose progress is not shown."""
        with Console(quiet=True).task(description, total, unit, done) as task:
            yield task


def run_stage(stages: Mapping[str, Stage], name: str, out: Path, console: Console, **options: object) -> None:
    """Run one of the stages of a run, with its number before what it prints; `options` are those of `Stage.run_in`."""
    with console.stage(stage_title(stages, name)):
        stages[name].run_in(out, console=console, **options)


def stage_title(stages: Collection[str], name: str) -> str:
    """Return the name of a stage of a run with its number; the report is the last one."""
    return f"{(*stages, name).index(name) + 1}/{len(stages) + 1} {name}"


def run_side_by_side(
    config: RunConfig,
    out: Path,
    names: Collection[str],
    *,
    processes: int,
    force: bool,
    console: Console,
    ended: Callable[[str], object] = lambda name: None,
) -> None:
    """Run stages of an experiment in several processes of this machine, which share its threads.

    Of the stages whose inputs are finished, those that most others wait for come first.

    Args:
        config: of the run.
        out: the run's directory, which `claim_directory` has claimed.
        names: of the stages to run; the inputs of each are finished or among them.
        processes: number of processes.
        force: replace outputs that were made from other settings or inputs.
        console: quiet or not, verbose or not.
        ended: called with the name of each stage that has ended.

    Raises:
        UserError: the device is not the CPU, a stage refused its input, or its process failed; the others have been stopped.
        TransientError: a process was killed.
        Interrupted: this process was asked to stop; the stages have been stopped.
    """
    if (device := resolve_device(config)) != "cpu":
        problem = f"shares the threads of the CPU, and this run's device is {device}"
        raise UserError(f"--side-by-side {processes}", problem, "leave it out, or set device=cpu")
    stages = stages_of(config)
    waiting = [name for name in _most_needed_first(stages) if name in names]
    finished = set(stages) - set(waiting)
    threads = max(1, resolve_threads(config) // processes)
    share = Share(config.model_copy(update={"threads": threads}), out, force, console.quiet, console.verbose, console.live)
    console.say(f"{processes} stages at a time, with {threads} thread(s) each")
    with console.bar(""), _started(share, processes) as connections:
        idle, running = list(connections), dict[Connection, str]()
        while waiting or running:
            ready = [name for name in waiting if finished.issuperset(stages[name].inputs.values())]
            for name in ready[: len(idle)]:
                waiting.remove(name)
                running[connection := idle.pop()] = name
                connection.send(name)
            console.retitle(", ".join(running.values()))
            answered = wait(list(running))
            for connection in [connection for connection in running if connection in answered]:
                line = _receive(connection, connections[connection], running[connection])
                if line is not None:
                    console.say(line)
                    continue
                finished.add(name := running.pop(connection))
                ended(name)
                idle.append(connection)


def _most_needed_first(stages: Mapping[str, Stage]) -> list[str]:
    needs = [needed_stages(stages, name) for name in stages]
    return sorted(stages, key=lambda name: -sum(name in needed for needed in needs))


@contextmanager
def _started(share: Share, processes: int) -> Iterator[dict[Connection, BaseProcess]]:
    """Yield the processes by their connections, and let them end."""
    spawn, started = multiprocessing.get_context("spawn"), dict[Connection, BaseProcess]()
    try:
        for _ in range(processes):
            here, there = spawn.Pipe()
            started[here] = spawn.Process(target=_work, args=(share, there))
            started[here].start()
            there.close()
        yield started
        for connection, process in started.items():
            connection.send(None)
            process.join()
    except (Interrupted, UserError):
        stop(list(started.values()))
        raise
    except BaseException:
        kill(list(started.values()))
        raise


def _work(share: Share, connection: Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    run_as_child(partial(share.run, connection), quiet=True)  # this process's parent prints what ends it


def _receive(connection: Connection, process: BaseProcess, name: str) -> str | None:
    """Return a line that a stage relays, or None once it is finished; raise the error that ended it."""
    try:
        answer = connection.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            problem = "its process was killed, most likely for want of memory"
            raise TransientError(name, problem, "rerun: it resumes where it stopped") from None
        problem = f"its process ended with exit code {process.exitcode}"
        raise UserError(name, problem, "see what it printed; run this stage alone (--until) to see it again") from None
    if isinstance(answer, UserError):
        raise answer
    return answer
