"""The shell commands of README and documentation, found as a reader finds them: in the code blocks of a page."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from code_blocks import code_blocks

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "bench/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAMS = ("sbp-fast", "make", "python", "pip", "torchrun", "srun", "docker", "ray", "hf", "ssh", "git", "cd", "head")
"""Programs that a page may tell its reader to run."""
SHELL_LANGUAGES = ("", "sh", "bash", "console")
DRAWINGS = (" documents\n", "README.md  CONTRIBUTING.md")
"""Beginnings of the blocks that show something else: what goes where, or a directory, whose first line may be a path."""
FILE_TREE = re.compile(r"\S+(/|\.json|\.bin|\.parquet|\.distcp)\s")


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page: file that holds it.
        words: the program and its arguments; assignments of environment variables before it are left out.
        toml: the last TOML block before it on the page, "" where there is none.
    """

    page: Path
    words: tuple[str, ...]
    toml: str = ""

    @property
    def program(self) -> str:
        """Name of the program, without the folder of a virtual environment."""
        return Path(self.words[0]).name

    def __str__(self) -> str:
        """Page and words, for the ids of tests."""
        return f"{os.path.relpath(self.page, ROOT)}: {shlex.join(self.words)}"


def commands_of(page: Path) -> list[Command]:
    """Return the commands of a page in their order.

    Raises:
        ValueError: a block holds something that is neither a command of a known program nor a drawing.
    """
    commands, toml = [], ""
    for language, block in code_blocks(page):
        toml = block if language == "toml" else toml
        if language in SHELL_LANGUAGES and not block.startswith(DRAWINGS) and not FILE_TREE.match(block):
            commands += [Command(page, words, toml) for words in _split(block)]
    for command in commands:
        if command.program not in PROGRAMS:
            raise ValueError(f"{command}: unknown program; the known ones are {', '.join(PROGRAMS)}")
    return commands


def _split(block: str) -> Iterator[tuple[str, ...]]:
    """Split a block at line ends and `&&`; a line that ends with a backslash goes on, and `$(...)` is one word."""
    for line in block.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(re.sub(r"\$\([^)]*\)", "SUBSTITUTED", line), comments=True), "&&"]:
            if word != "&&":
                words.append(word)
                continue
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            if words:
                yield tuple(words)
            words = []
