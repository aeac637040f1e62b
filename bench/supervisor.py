"""Measuring a benchmark in a process that may die or hang, with no more lost than the provider that did it.

All providers of a case are prepared and timed in one process, in interleaved rounds, since a ratio means something only there.
The process announces each step of a provider before it takes it. Where the process dies (a segmentation fault, a CUDA error
that stays with the context) or is silent for too long (a kernel that does not end), the provider of the last step is left out
from there on, with the reason, and a new process begins at the same case. A probe of every provider in a process of its own
would find the same at the cost of a start for each: several seconds, in cases that take one.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any

from bench import records
from bench.runner import failure
from bench.worker import Request

ROOT = Path(__file__).parent.parent
COMMAND = (sys.executable, "-X", "faulthandler", "-m", "bench.worker")
STEP_SECONDS = 3600.0  # for one step of a provider, where nobody says less
EXIT_SECONDS = 30.0  # for a process that has sent its last event
STDERR_LINES = 20  # that a reason quotes

Row = dict[str, Any]
Event = dict[str, Any]


class WorkerLost(Exception):
    """The process ended, or was ended, before its last event."""


class Supervision:
    """One benchmark: its results so far, and the processes that measure them.

    Attributes:
        name: of the benchmark.
        folder: of the results of all devices.
        show: called with each measured case.
        step_seconds: time limit of a step.
        path: file of the results; None before the environment is known.
        rows: measured cases by index.
    """

    def __init__(self, name: str, folder: Path, show: Callable[[Row], None], step_seconds: float = STEP_SECONDS) -> None:
        self.name, self.folder, self.show, self.step_seconds = name, folder, show, step_seconds
        self.path: Path | None = None
        self.rows: dict[int, Row] = {}
        self._record: dict[str, Any] = {}
        self._step: Event = {}  # last event of a case: who is to blame for what happens next
        self._providers: list[str] = []

    def run(self, request: Request) -> bool:
        """Measure all cases and return whether they were all reached in time.

        Raises:
            ImportError: the benchmark needs a package that is not installed.
            WorkerLost: a process ended before it reached a case.
        """
        ends = time.monotonic() + request.seconds
        while (seconds := ends - time.monotonic()) > 0:
            self._step = {}
            try:
                for event in worker_events(replace(request, seconds=seconds), self.step_seconds):
                    if "end" in event:
                        return bool(event["end"])
                    self._receive(event)
            except WorkerLost as error:
                if not self._step:
                    raise
                request = self._blame(request, str(error))
        return False

    def _receive(self, event: Event) -> None:
        if "missing" in event:
            raise ImportError(event["missing"])
        if "lost" in event:
            raise WorkerLost(event["lost"])
        if "environment" in event:
            self.path = records.path_of(self.folder, self.name, event["environment"]["device"])
            self._record = records.new_record(self.name, event["environment"])
            return
        self._step = event
        if "row" in event:
            self._providers = event["providers"]
            self._save(event["case"], event["row"])
            if event["done"]:
                self.show(event["row"])

    def _save(self, index: int, row: Row) -> None:
        self.rows[index] = row
        self._record["cases"] = [self.rows[index] for index in sorted(self.rows)]
        assert self.path is not None
        records.save(self.path, self._record)

    def _blame(self, request: Request, reason: str) -> Request:
        """Record why the process was lost, and return what is left to measure."""
        index, provider = self._step["case"], self._step.get("provider", "")
        row, ours = self.rows[index], self._providers[0]
        if self._step.get("done"):  # between two cases
            return replace(request, first=index + 1)
        where = f"ended the process in step {self._step.get('step', 'set-up')!r} of {records.title(row)}: {reason}"
        left_out = dict(request.left_out)
        if provider not in ("", ours):
            left_out[provider] = where
            if "seconds" not in row:
                return replace(request, first=index, left_out=left_out)
        if "seconds" in row:  # providers one at a time: what was measured stands
            for name in self._providers:
                if name not in row["seconds"]:
                    row["left_out"].setdefault(name, left_out.get(name, f"not reached: {provider} {where}"))
        else:
            row |= failure(f"{provider} {where}".strip(), left_out)
        self._save(index, row)
        self.show(row)
        return replace(request, first=index + 1, left_out=left_out)


def worker_events(request: Request, step_seconds: float) -> Iterator[Event]:
    """Start a worker and yield its events.

    Raises:
        WorkerLost: it died, or sent nothing for `step_seconds` and was killed; the message quotes its last lines.
    """
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    with subprocess.Popen(
        COMMAND, env=environment, text=True, errors="replace", stdin=PIPE, stdout=PIPE, stderr=PIPE
    ) as worker:
        assert worker.stdin and worker.stdout and worker.stderr
        lines: queue.Queue[str | None] = queue.Queue()
        last: deque[str] = deque(maxlen=STDERR_LINES)
        readers = [
            threading.Thread(target=_read, args=(worker.stdout, lines.put), daemon=True),
            threading.Thread(target=_read, args=(worker.stderr, lambda line: _echo(line, last)), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            with suppress(BrokenPipeError):  # it died at once: its last lines say why
                worker.stdin.write(json.dumps(asdict(request)))
                worker.stdin.close()
            while (line := lines.get(timeout=step_seconds)) is not None:
                event: Event = json.loads(line)
                yield event
                if "end" in event:
                    _wait(worker)
                    return
            code = _wait(worker)
            readers[1].join(EXIT_SECONDS)
            raise WorkerLost("\n".join([_ending(code), *last]))
        except queue.Empty:
            raise WorkerLost(f"nothing within {step_seconds:.0f} seconds") from None
        finally:
            worker.kill()


def _wait(worker: subprocess.Popen[str]) -> int:
    """Return the exit code of a process that has nothing left to say, killed where it does not end by itself."""
    try:
        return worker.wait(EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()
        return worker.wait()


def _read(stream: IO[str], receive: Callable[[str | None], None]) -> None:
    for line in stream:
        receive(line)
    receive(None)


def _echo(line: str | None, last: deque[str]) -> None:
    if line is not None:
        last.append(line.rstrip("\n"))
        sys.stderr.write(line)
        sys.stderr.flush()


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
