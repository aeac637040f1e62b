"""A console whose lines a test reads."""

from __future__ import annotations

from sbp_fast.pipeline.progress import Console


class RecordingConsole(Console):
    """A quiet console that keeps what is said.

    Attributes:
        lines: texts, without the name of the stage before them.
    """

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Keep a text."""
        self.lines.append(text)
