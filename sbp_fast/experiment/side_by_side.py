"""Stages of an experiment side by side: each runs in one of several processes as soon as its inputs are finished.

Operations of small models gain little from a second thread, so that several stages with a thread each end sooner than one stage
after another with all threads (docs/log.md).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Collection, Iterator, Mapping
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
from sbp_fast.pipeline.progress import Console


@dataclass(frozen=True)
class Share:
    """What a process needs to run stages of an experiment.

    Attributes:
        config: of the run, with this process's share of the threads.
        out: the run's directory.
        force: replace outputs that were made from other settings or inputs.
        quiet: print nothing.
    """

    config: RunConfig
    out: Path
    force: bool
    quiet: bool

    def run(self, connection: Connection) -> None:
        """Run the stages whose names come through a connection, and answer each with its error or None, until None comes."""
        stages, console = stages_of(self.config), Console(quiet=self.quiet, force_plain=True)
        while (name := connection.recv()) is not None:
            try:
                run_stage(stages, name, self.out, console, force=self.force)
            except UserError as error:
                connection.send(error)
            else:
                connection.send(None)


def run_stage(stages: Mapping[str, Stage], name: str, out: Path, console: Console, **options: object) -> None:
    """Run one of the stages of a run, with its number before what it prints; `options` are those of `Stage.run_in`."""
    with console.stage(f"{list(stages).index(name) + 1}/{len(stages) + 1} {name}"):
        stages[name].run_in(out, console=console, **options)


def run_side_by_side(
    config: RunConfig, out: Path, names: Collection[str], *, processes: int, force: bool, console: Console
) -> None:
    """Run stages of an experiment in several processes of this machine, which share its threads.

    Of the stages whose inputs are finished, those that most others wait for come first.

    Args:
        config: of the run.
        out: the run's directory, which `claim_directory` has claimed.
        names: of the stages to run; the inputs of each are finished or among them.
        processes: number of processes.
        force: replace outputs that were made from other settings or inputs.
        console: quiet or not.

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
    share = Share(config.model_copy(update={"threads": threads}), out, force, console.quiet)
    console.say(f"{processes} stages at a time, with {threads} thread(s) each")
    with _started(share, processes) as connections:
        idle, running = list(connections), dict[Connection, str]()
        while waiting or running:
            ready = [name for name in waiting if finished.issuperset(stages[name].inputs.values())]
            for name in ready[: len(idle)]:
                waiting.remove(name)
                running[connection := idle.pop()] = name
                connection.send(name)
            answered = wait(list(running))
            for connection in [connection for connection in running if connection in answered]:
                finished.add(_receive(connection, connections[connection], running.pop(connection)))
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


def _receive(connection: Connection, process: BaseProcess, name: str) -> str:
    """Return the name of a stage once it is finished; raise the error that ended it."""
    try:
        error = connection.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            problem = "its process was killed, most likely for want of memory"
            raise TransientError(name, problem, "rerun: it resumes where it stopped") from None
        problem = f"its process ended with exit code {process.exitcode}"
        raise UserError(name, problem, "see what it printed; run this stage alone (--until) to see it again") from None
    if error is not None:
        raise error
    return name
