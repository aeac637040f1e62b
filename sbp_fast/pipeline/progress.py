"""Progress for people: a live bar on a terminal, plain lines elsewhere. All text is made printable first."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from sbp_fast.pipeline.credentials import without_credentials

PLAIN_LINE_SECONDS = 5.0
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, which steer a terminal; line ends; bidirectional controls, which reorder the text; lone surrogates."""


def printable(text: str, *, lines: bool = False) -> str:
    """Return a text for a terminal: what `UNPRINTABLE` matches is escaped as in Python, so that it shows and does nothing.

    The secrets of URLs are left out.
    For all text that others may have written: of documents, file names, settings, servers and libraries.

    Args:
        text: any string.
        lines: keep line feeds, for a text of several lines.
    """
    text = without_credentials(text)
    return UNPRINTABLE.sub(lambda match: match[0] if lines and match[0] == "\n" else _escaped(match[0]), text)


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]


def print_line(text: str, file: Any = None) -> None:
    """Print one line on standard output, or another file."""
    print(printable(text), file=file, flush=True)


def print_error(error: Exception) -> None:
    """Print the one line of a user's mistake."""
    print_line(f"error: {error}", sys.stderr)


class PrintableConsole(RichConsole):
    """A console of rich that makes every string printable, those in tables, too."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as rich text."""
        return super().render_str(printable(text, lines=True), **options)


class Task:
    """Progress of one activity of known size."""

    def __init__(self, console: Console, description: str, total: float, unit: str, done: float) -> None:
        self.description, self.total, self.unit = printable(description), max(total, 1e-9), unit
        self.done = self.start_done = done
        self.note = ""
        self.started = self._printed = time.monotonic()
        self._console = console
        self._bar: Progress | None = None

    def advance(self, amount: float, note: str = "") -> None:
        """Add `amount` units of finished work; `note` (such as the loss) is shown until the next note."""
        self.done += amount
        self.note = printable(note) or self.note
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=min(self.done, self.total), text=self.status())
        elif now - self._printed >= PLAIN_LINE_SECONDS:
            self._printed = now
            self._console.say(f"{self.description} {self.status()}")

    def status(self) -> str:
        """Return the share done, the rate and the time left, as text."""
        seconds = time.monotonic() - self.started
        rate = (self.done - self.start_done) / seconds if seconds > 0 else 0.0
        parts = [f"{min(self.done / self.total, 1):.0%}", f"{short(self.done)}/{short(self.total)} {self.unit}"]
        if rate > 0:
            parts += [f"{short(rate)}/s", f"{duration(max(self.total - self.done, 0) / rate)} left"]
        return ", ".join(parts + ([self.note] if self.note else []))


class Console:
    """Output of a run for people; `quiet` suppresses it (tests, libraries)."""

    def __init__(self, quiet: bool = False, force_plain: bool = False) -> None:
        self.quiet = quiet
        self.rich = PrintableConsole(quiet=quiet, highlight=False, soft_wrap=True)
        self.live = self.rich.is_terminal and not force_plain and not quiet
        self.prefix = ""

    def __reduce__(self) -> tuple[type[Console], tuple[bool]]:
        return Console, (True,)  # quiet in another process: only one of them prints

    def say(self, text: str) -> None:
        """Print one line, prefixed with the name of the current stage."""
        self.rich.print(printable(f"{self.prefix}{text}"), markup=False)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Prefix every line printed inside with `title`."""
        before, self.prefix = self.prefix, f"[{title}] "
        try:
            yield
        finally:
            self.prefix = before

    @contextmanager
    def task(self, description: str, total: float, unit: str, done: float = 0) -> Iterator[Task]:
        """Show the progress of `total` units of work, of which `done` were finished earlier."""
        task = Task(self, description, total, unit, done)
        if self.live:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(24),
                TextColumn("{task.fields[text]}", markup=False),
            )
            with Progress(*columns, TimeElapsedColumn(), console=self.rich, transient=True) as bar:
                bar.add_task(escape(printable(self.prefix + description)), total=total, completed=int(done), text="")
                task._bar = bar
                yield task
        else:
            yield task
        seconds = time.monotonic() - task.started
        self.say(f"{description}: {short(task.done)} {unit} in {duration(seconds)}" + (f", {task.note}" if task.note else ""))


def short(number: float) -> str:
    """Return a number in about three digits: 950, 12.3k, 4.56M, 1.2B, 7.8e15."""
    for limit, divisor, suffix in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "B"), (1e15, 1e12, "T")):
        if abs(number) < 0.9995 * limit:  # larger numbers would round up to the next unit
            scaled = number / divisor
            text = f"{scaled:.0f}" if scaled == int(scaled) or abs(scaled) >= 100 else f"{scaled:.3g}"
            return text + suffix
    return f"{number:.2e}"


def duration(seconds: float) -> str:
    """Return a duration for people: 8s, 1m05s, 2h13m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
