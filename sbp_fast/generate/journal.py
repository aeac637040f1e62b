"""The finished documents of an incomplete shard, appended to a file: they survive a kill and are not generated again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from sbp_fast.generate.decoder import STOPS
from sbp_fast.generate.engine import GenerationResult

RECORD = np.dtype([("seed", "<i8"), ("sample", "<i8"), ("tokens", "<i4"), ("stop", "<i4"), ("log_probability", "<f8")])
TOKEN = np.dtype("<i4")


class Journal:
    """A shard's file, open for appending.

    A document is a record, its tokens and their checksum, in one write. Opening the file truncates it at the first document
    that is incomplete or has a wrong checksum.

    Attributes:
        results: the documents in the file, by seed and sample.
    """

    def __init__(self, path: Path) -> None:
        self.results: dict[tuple[int, int], GenerationResult] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        content = path.read_bytes()
        valid = 0
        for result, end in _read(content):
            self.results[result.seed, result.sample] = result
            valid = end
        if valid < len(content):
            os.ftruncate(self._file, valid)

    def add(self, result: GenerationResult) -> None:
        """Append a document.

        It is handed to the OS (no fsync): it survives a process kill, not a power loss.
        """
        stop = STOPS.index(result.stop)
        record = np.array((result.seed, result.sample, len(result.tokens), stop, result.log_probability), RECORD)
        content = record.tobytes() + result.tokens.astype(TOKEN).tobytes()
        content += xxhash.xxh3_64_digest(content)
        written = os.write(self._file, content)
        if written < len(content):
            os.write(self._file, content[written:])  # raises the error of a full disk
        self.results[result.seed, result.sample] = result

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _read(content: bytes) -> Iterator[tuple[GenerationResult, int]]:
    """Yield each valid document and the offset of its end."""
    start = 0
    while start + RECORD.itemsize <= len(content):
        record = np.frombuffer(content, RECORD, 1, start)[0]
        body = start + RECORD.itemsize
        end = body + int(record["tokens"]) * TOKEN.itemsize
        if end < body or content[end : end + 8] != xxhash.xxh3_64_digest(content[start:end]):
            return
        tokens = np.frombuffer(content[body:end], TOKEN)
        stop = STOPS[int(record["stop"])]
        start = end + 8
        seed, sample = int(record["seed"]), int(record["sample"])
        yield GenerationResult(seed, sample, tokens, stop, float(record["log_probability"])), start
