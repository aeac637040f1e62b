"""A command in a pseudo-terminal: what it writes, and when."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
UNSET = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


@dataclass(frozen=True)
class Session:
    """What a command wrote to its terminal.

    Attributes:
        exit_code: of the command.
        chunks: (seconds since the start, text) as they were written.
    """

    exit_code: int
    chunks: list[tuple[float, str]]

    @property
    def rows(self) -> list[str]:
        """What was written between line ends and returns, bars among it, without control sequences."""
        return re.split(r"[\r\n]+", CONTROL.sub("", "".join(text for _, text in self.chunks)))

    @property
    def lines(self) -> list[str]:
        """The lines on the terminal at the end; bars have been erased."""
        return screen("".join(text for _, text in self.chunks))

    def times(self, pattern: str) -> list[float]:
        """Seconds at which a text was written."""
        return [seconds for seconds, text in self.chunks if re.search(pattern, CONTROL.sub("", text))]


def screen(written: str) -> list[str]:
    """Return the lines that a terminal shows after a text with control sequences was written to it."""
    lines, row, column = [""], 0, 0
    for sequence, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)|([^\x1b\r\n]+)", written):
        if text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif sequence == "\r":
            column = 0
        elif sequence == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif sequence.endswith("A"):
            row -= int(sequence[2:-1] or 1)
        elif sequence.endswith("K"):
            lines[row] = "" if sequence == "\x1b[2K" else lines[row][:column]
    return [line.rstrip() for line in lines]


def run_in_terminal(
    command: Sequence[str | Path],
    columns: int,
    *,
    timeout: float = 120,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Session:
    """Run a command in a terminal of so many columns, to its end.

    Args:
        command: program and arguments.
        columns: width of the terminal.
        timeout: seconds after which the command is killed.
        environment: variables beside the inherited ones.
        directory: where it runs; None: the current directory.
    """
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in UNSET}
    inherited |= {"TERM": "xterm-256color", **(environment or {})}
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdin=other, stdout=other, stderr=other, env=inherited, cwd=directory, start_new_session=True
    )
    os.close(other)
    chunks = []
    try:
        while time.monotonic() - started < timeout:
            if select.select([main], [], [], 0.1)[0]:
                try:
                    content = os.read(main, 1 << 16)
                except OSError:  # all ends of the terminal are closed
                    break
                chunks.append((time.monotonic() - started, content.decode("utf-8", "replace")))
        return Session(process.wait(timeout=10), chunks)
    finally:
        process.kill()
        os.close(main)
