"""Tasks of the tests of Ray, in a module that is quick to import: every new process of the cluster does so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import atomic_open, atomic_path


class FakeEncoder:
    """Counts words, in the place of a model that takes seconds to load."""

    words = ("the", "cat", "dog", "tree", "house", "sees", "eats", "climbs", "near", "under", "small", "red", "of", "river")
    dimension, limit, batch_documents = len(words), 30, 8
    counts: ClassVar[dict[str, Any]] = {}

    def lengths_of(self, texts: list[str]) -> np.ndarray:
        return np.array([len(text.split()) for text in texts])

    def encode(
        self, texts: list[str], progress: Callable[[int], object], *, lengths: np.ndarray, name: Callable[[int], str]
    ) -> np.ndarray:
        progress(len(texts))
        counts = np.array([[text.split().count(word) for word in self.words] for text in texts], np.float32) + 0.1
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    def flops(self, lengths: np.ndarray) -> float:
        return float(lengths.sum())


def open_fake(corpus: Path, placement: object) -> tuple[FakeEncoder, PreparedCorpus]:
    return FakeEncoder(), PreparedCorpus(corpus)


def killed_once(marker: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return function(*arguments)
    os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)


def square(number: int) -> int:
    time.sleep(0.2 * (number == 1))
    if number < 0:
        raise UserError(number, "is negative", "give a positive number")
    return number * number


def note_and_square(directory: Path, number: int) -> int:
    (directory / str(number)).touch()
    return square(number)


def write_slowly(directory: Path, number: int) -> None:
    """Fail once the other task has written, or write as long as it is let."""
    while not number and not (directory / "written").exists():
        time.sleep(0.01)
    if not number:
        raise UserError(number, "is nothing", "give more")
    for count in range(100_000):
        with atomic_open(directory / "written") as file:
            file.write(str(count).encode())


def write_slowly_with_tool(directory: Path, number: int, advance: Any) -> None:
    write_slowly(directory, number)


def process_number(placement: object) -> int:
    return os.getpid()


def slowly_first(process: int, number: int, advance: Callable[[float], object]) -> tuple[int, int]:
    time.sleep(1.0 * (number == 1))
    advance(number)
    return number, process


def die(number: int) -> None:
    os._exit(1)


def temporary_name(path: Path) -> str:
    with atomic_path(path) as temporary:
        temporary.touch()
        return temporary.name


def read(path: Path) -> bytes:
    return path.read_bytes()


def return_directory(directory: Path, placement: object) -> Path:
    return directory
