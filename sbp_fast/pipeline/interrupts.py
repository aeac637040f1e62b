"""What SIGINT and SIGTERM do: the first one ends any stage within seconds, with its lock held until nothing writes any more.

The first signal raises `Interrupted` in the main thread. Whoever has threads or processes ends them on the way out. If that
takes longer than GRACE_SECONDS, or a second signal comes, the process is abandoned: its worker processes are killed and it
exits at once, which is safe because every file is written atomically. A block that has to finish, such as the checkpoint of a
training run, uses `StopRequest` or `without_deadline`; only a second signal abandons it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 5.0
ANNOUNCING_SECONDS = 1.0  # at most, that the last word waits for the first
STOPPING = "stopping: what is finished stays; press Ctrl-C again to stop at once"
STOPPED = "stopped; the same command resumes from here"
PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """Raised in the main thread by the first SIGINT or SIGTERM; only the command line catches it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(STOPPED)
        self.signal_number, self.exit_code = signal_number, 128 + signal_number


class Stopped(Exception):
    """Raised after SIGTERM or SIGINT, once a checkpoint of the first `steps` steps is saved."""

    def __init__(self, signal_number: int, steps: int) -> None:
        super().__init__(f"stopped after {steps} steps, which are saved: the same command resumes from here")
        self.exit_code = 128 + signal_number


class _Signals:
    """State of this process: the first signal that came, whether that was said, and how many blocks have to finish."""

    number = 0
    announced = threading.Event()
    unlimited = 0


@contextmanager
def watch_signals(signals: Sequence[int] = SIGNALS, *, quiet: bool = False) -> Iterator[None]:
    """Let signals end this process, as the module describes, while a block of the main thread runs.

    Python runs handlers in the main thread only, which may be busy in a library for minutes. The watching thread is woken by
    the signal itself.

    Args:
        signals: numbers of the signals.
        quiet: print nothing, because another process does.
    """
    _Signals.number = 0
    _Signals.announced.clear()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_watch, args=(reading, frozenset(signals), quiet), daemon=True).start()
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = {number: signal.signal(number, _interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(writing)  # ends the watching thread


def signal_received() -> int:
    """Return the number of the first signal that came, or 0."""
    return _Signals.number


def _interrupt(number: int, frame: FrameType | None) -> None:
    first, _Signals.number = not _Signals.number, _Signals.number or number
    if first:  # an exception in the middle of the clean-up would let threads outlive it; the watching thread hears of both
        raise Interrupted(number)


def _watch(reading: int, signals: frozenset[int], quiet: bool) -> None:
    """Read the numbers of signals until the other end of the pipe is closed."""
    number = 0
    while True:
        seconds = GRACE_SECONDS if number else None
        ready, _, _ = select.select([reading], [], [], seconds)
        received = os.read(reading, 64) if ready else b""
        if ready and not received:
            os.close(reading)
            return
        news = signals.intersection(received)
        if number and (news or (not ready and not _Signals.unlimited)):
            abandon(number, "" if quiet else STOPPED)
        if news and not number:
            number = next(byte for byte in received if byte in signals)
            if not quiet:
                say(STOPPING)
            _Signals.announced.set()


def wait_for_announcement() -> None:
    """Wait until the watching thread has said that a signal came, so that what the main thread says of the end stands below."""
    _Signals.announced.wait(ANNOUNCING_SECONDS)


def abandon(signal_number: int, message: str) -> NoReturn:
    """Kill the worker processes, print a message and end this process, and with it its threads and its locks."""
    wait_for_announcement()
    with suppress(Exception):  # the main thread may be ending them, too
        for process in multiprocessing.active_children():
            process.kill()
            process.join(GRACE_SECONDS)
    end(128 + signal_number, message)


def end(exit_code: int, message: str) -> NoReturn:
    """Print a message and end this process without waiting for threads."""
    if message:
        say(message)
    os._exit(exit_code)


def say(message: str) -> None:
    """Print a line on standard error without Python's buffers, which another thread may hold, and show the cursor again."""
    cursor = "\r\x1b[?25h\x1b[K" if os.isatty(2) else ""
    with suppress(OSError):
        os.write(2, f"{cursor}{message}\n".encode())


@contextmanager
def without_deadline() -> Iterator[None]:
    """Let a block take the time that it needs after the first signal; a second one still abandons the process."""
    _Signals.unlimited += 1
    try:
        yield
    finally:
        _Signals.unlimited -= 1


class _Ended(BaseException):
    """Raised by the first signal in a block of `ended_by_signal`."""


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """Let SIGINT or SIGTERM end a block of the main thread that has nothing to finish, such as a server; nothing is printed."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _Ended

    woken = signal.set_wakeup_fd(-1)  # the watching thread would say that a stage is being stopped
    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    except _Ended:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)


class StopRequest:
    """A context manager that records SIGTERM and SIGINT, so that a run can end between two steps.

    A second signal abandons the process where `watch_signals` was called, and raises KeyboardInterrupt elsewhere. A signal on
    which the block did not act raises `Interrupted` when it ends.

    Attributes:
        signal_number: number of the signal that this process received, or 0.
        agreed_signal: number of the signal that any process received, once all processes have exchanged it; 0 before.
    """

    def __init__(self) -> None:
        self.signal_number = self.agreed_signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        _Signals.unlimited += 1
        for number in SIGNALS:
            try:
                before = signal.getsignal(number)
                if before != signal.SIG_IGN:  # a process that another one started leaves the keyboard to that one
                    self._before[number] = signal.signal(number, self._remember)
            except ValueError:  # only the main thread may set handlers; in other threads the caller stops the run
                break
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = _Signals.number = number

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _Signals.unlimited -= 1
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self.signal_number:
            raise Interrupted(self.signal_number)


def end_with_parent() -> None:
    """Let this process be killed when the process that started it ends: it must not write beside the next attempt.

    Linux does it at once. The thread serves other systems, and a parent that ended before this call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
