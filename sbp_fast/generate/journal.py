"""Documents of one shard as they are over, appended to a file: what is whole in it survives a kill, and is not drawn again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from sbp_fast.generate.decoder import STOPS
from sbp_fast.generate.engine import Draft

RECORD = np.dtype([("seed", "<i8"), ("sample", "<i8"), ("tokens", "<i4"), ("stop", "<i4"), ("log_probability", "<f8")])
TOKEN = np.dtype("<i4")


class Journal:
    """The file of a shard, open to be appended to.

    A document is a record, its tokens and their checksum, written at once. A document that a kill cut short is cut off when
    the file is next opened, and what follows one with a wrong checksum as well.

    Attributes:
        drafts: what is in it, by seed and sample.
    """

    def __init__(self, path: Path) -> None:
        self.drafts: dict[tuple[int, int], Draft] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        content = path.read_bytes()
        whole = 0
        for draft, end in _read(content):
            self.drafts[draft.seed, draft.sample] = draft
            whole = end
        if whole < len(content):
            os.ftruncate(self._file, whole)

    def add(self, draft: Draft) -> None:
        """Append a document; it is the system's to keep from here on."""
        stop = STOPS.index(draft.stop)
        record = np.array((draft.seed, draft.sample, len(draft.tokens), stop, draft.log_probability), RECORD)
        content = record.tobytes() + draft.tokens.astype(TOKEN).tobytes()
        content += xxhash.xxh3_64_digest(content)
        written = os.write(self._file, content)
        if written < len(content):
            os.write(self._file, content[written:])  # a full disk: says so
        self.drafts[draft.seed, draft.sample] = draft

    def close(self) -> None:
        os.close(self._file)


def _read(content: bytes) -> Iterator[tuple[Draft, int]]:
    """Each whole document and where it ends."""
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
        yield Draft(int(record["seed"]), int(record["sample"]), tokens, stop, float(record["log_probability"])), start
