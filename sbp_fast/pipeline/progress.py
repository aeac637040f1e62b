"""Progress for people: a bar and lines broken between words on a terminal, plain lines elsewhere.

All text is made printable first.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sbp_fast.pipeline.credentials import without_credentials

PLAIN_LINE_SECONDS = 5.0
REFRESHES_PER_SECOND = 5
WIDE_TERMINAL, WIDE_BAR, NARROW_BAR = 100, 24, 12  # columns
LEFT_OUT_FIRST = ("rate", "amount", "note", "left")
"""Figures of a task that a narrow terminal has no space for, the least important first."""
INDENTATION = "  "  # of the lines after the first one of a text
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


def wrap_words(text: str, width: int) -> str:
    """Break a text between words into lines of at most `width` cells; a longer word stays whole, on a line of its own."""
    lines, line = list[str](), ""
    for word in re.split(r"(?<=\s)(?=\S)", text):  # with the spaces after it
        if line.strip() and cell_len(line + word.rstrip()) > width:
            lines.append(line.rstrip())
            line = INDENTATION
        line += word
    return "\n".join([*lines, line.rstrip()])


def print_line(text: str, file: Any = None) -> None:
    """Print a text on standard output, or another file: on a terminal broken between words, elsewhere as one line."""
    text, is_terminal = printable(text), (file or sys.stdout).isatty()
    print(wrap_words(text, shutil.get_terminal_size().columns) if is_terminal else text, file=file, flush=True)


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

    def advance(self, amount: float, note: str = "") -> None:
        """Add `amount` units of finished work; `note` (such as the loss) is shown until the next note."""
        self.done += amount
        self.note = printable(note) or self.note
        now = time.monotonic()
        if not self._console.live and now - self._printed >= PLAIN_LINE_SECONDS:
            self._printed = now
            self._console.say(f"{self.description} {self.status()}")

    @property
    def share(self) -> float:
        """Share of the work that is done, from 0 to 1."""
        return min(self.done / self.total, 1)

    def figures(self) -> dict[str, str]:
        """Return the share done, the amount, the rate, the time left and the note, as far as they are known."""
        seconds = time.monotonic() - self.started
        rate = (self.done - self.start_done) / seconds if seconds > 0 else 0.0
        figures = {"share": f"{self.share:.0%}", "amount": f"{short(self.done)}/{short(self.total)} {self.unit}"}
        if rate > 0:
            figures["rate"] = f"{short(rate)}/s"
            figures["left"] = f"{duration(max(self.total - self.done, 0) / rate)} left"
        return figures | ({"note": self.note} if self.note else {})

    def status(self) -> str:
        """Return all figures as text."""
        return ", ".join(self.figures().values())


class Bar:
    """One line of a terminal: a spinner, a title, a bar, the figures of a task, and the time since the line began.

    A thread draws it, so that it moves while the main thread imports, loads or compiles. What has no space is left out whole.

    Args:
        console: of the terminal.
        title: what is going on; printable.

    Attributes:
        task: the one whose progress is shown; without one, the bar pulses.
    """

    def __init__(self, console: RichConsole, title: str) -> None:
        self.title, self.started = title, time.monotonic()
        self.task: Task | None = None
        self._spinner = Spinner("dots")
        self._live = Live(self, console=console, transient=True, refresh_per_second=REFRESHES_PER_SECOND)

    def show(self) -> None:
        """Begin to draw, or go on after `hide`."""
        self._live.start(refresh=True)

    def hide(self) -> None:
        """Remove the line from the terminal."""
        self._live.stop()

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        width, task, elapsed = options.max_width, self.task, duration(time.monotonic() - self.started)
        bar = WIDE_BAR if width >= WIDE_TERMINAL else NARROW_BAR
        space = width - cell_len(f"* {'-' * bar}  {elapsed}") - 2  # of the title and the figures, which have a gap before each
        title, figures = self.title, task.figures() if task is not None else {}
        for name in LEFT_OUT_FIRST:
            if cell_len(f"{title}{', '.join(figures.values())}") <= space:
                break
            figures.pop(name, None)
        shown = ", ".join(figures.values())
        if task is not None and cell_len(f"{title} {task.description}{shown}") <= space:
            title = f"{title} {task.description}".strip()
        row = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
        for _ in range(5):
            row.add_column(no_wrap=True)
        total, done = (task.total, min(task.done, task.total)) if task is not None else (None, 0.0)
        progress = ProgressBar(total, done, bar, pulse=task is None, animation_time=time.monotonic())
        row.add_row(self._spinner, Text(title, overflow="ellipsis"), progress, Text(shown), Text(elapsed))
        yield row


class Console:
    """Output of a run for people.

    Args:
        quiet: print nothing (tests, libraries).
        force_plain: print plain lines on a terminal, too.
        verbose: print technical details, too.
    """

    def __init__(self, quiet: bool = False, force_plain: bool = False, verbose: bool = False) -> None:
        self.quiet, self.verbose = quiet, verbose
        self.rich = PrintableConsole(quiet=quiet, highlight=False, soft_wrap=True)
        self.live = self.rich.is_terminal and not self.rich.is_dumb_terminal and not force_plain and not quiet
        self.prefix = ""
        self._bar: Bar | None = None

    def __reduce__(self) -> tuple[type[Console], tuple[bool]]:
        return Console, (True,)  # quiet in another process: only one of them prints

    def say(self, text: str) -> None:
        """Print a text after the name of the current stage: on a terminal broken between words, elsewhere as one line."""
        line = printable(f"{self.prefix}{text}")
        self.rich.print(Text(wrap_words(line, self.rich.width) if self.rich.is_terminal else line))

    def print_table(self, table: Table) -> None:
        """Print a table: on a terminal no wider than that, elsewhere as wide as it is."""
        self.rich.print(table, soft_wrap=not self.rich.is_terminal)

    def detail(self, text: str) -> None:
        """Print a text that only `verbose` output has."""
        if self.verbose:
            self.say(text)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Prefix every line printed inside with `title`, and show the bar."""
        before, self.prefix = self.prefix, f"[{title}] "
        try:
            with self.bar(self.prefix.strip()):
                yield
        finally:
            self.prefix = before

    @contextmanager
    def bar(self, title: str) -> Iterator[None]:
        """Show a bar on a terminal until the block ends, unless one is there; tasks inside show their progress in it."""
        if not self.live or self._bar is not None:
            yield
            return
        self._bar = Bar(self.rich, printable(title))
        self._bar.show()
        try:
            yield
        finally:
            self._bar.hide()
            self._bar = None

    @property
    def title(self) -> str:
        """Title of the bar; "" if none is there."""
        return "" if self._bar is None else self._bar.title

    def retitle(self, title: str) -> None:
        """Change the title of the bar, if one is there."""
        if self._bar is not None:
            self._bar.title = printable(title)

    @contextmanager
    def bar_hidden(self) -> Iterator[None]:
        """Leave the terminal to another process until the block ends."""
        if self._bar is not None:
            self._bar.hide()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.show()

    @contextmanager
    def task(self, description: str, total: float, unit: str, done: float = 0) -> Iterator[Task]:
        """Show the progress of `total` units of work, of which `done` were finished earlier.

        Its last line is a detail where the bar has shown the progress of the stage of a run, which has a last line of its own.
        """
        task = Task(self, description, total, unit, done)
        with self.bar(""), self._shown(task):
            yield task
        seconds = time.monotonic() - task.started
        line = f"{description}: {short(task.done)} {unit} in {duration(seconds)}" + (f", {task.note}" if task.note else "")
        (self.detail if self.live and self.prefix else self.say)(line)

    @contextmanager
    def _shown(self, task: Task) -> Iterator[None]:
        if self._bar is None:
            yield
            return
        before, self._bar.task = self._bar.task, task
        try:
            yield
        finally:
            self._bar.task = before


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
