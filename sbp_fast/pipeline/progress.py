"""Progress for people: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PLAIN_LINE_SECONDS = 5.0


class Task:
    """Progress of one activity of known size."""

    def __init__(self, console: Console, description: str, total: float, unit: str, done: float) -> None:
        self.description, self.total, self.unit = description, max(total, 1e-9), unit
        self.done = self.start_done = done
        self.note = ""
        self.started = self._printed = time.monotonic()
        self._console = console
        self._bar: Progress | None = None

    def advance(self, amount: float, note: str = "") -> None:
        """Add `amount` units of finished work; `note` (such as the loss) is shown until the next note."""
        self.done += amount
        self.note = note or self.note
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
        self.rich = RichConsole(quiet=quiet, highlight=False, soft_wrap=True)
        self.live = self.rich.is_terminal and not force_plain and not quiet
        self.prefix = ""

    def __reduce__(self) -> tuple[type[Console], tuple[bool]]:
        return Console, (True,)  # quiet in another process: only one of them prints

    def say(self, text: str) -> None:
        """Print one line, prefixed with the name of the current stage."""
        self.rich.print(f"{self.prefix}{text}", markup=False)

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
                TextColumn("{task.fields[text]}"),
            )
            with Progress(*columns, TimeElapsedColumn(), console=self.rich, transient=True) as bar:
                bar.add_task(self.prefix.replace("[", r"\[") + description, total=total, completed=int(done), text="")
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
