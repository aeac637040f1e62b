"""A bounded cache on local disk for the blocks of remote corpora, which all processes of a machine share.

SBP_FAST_CACHE names the directory, SBP_FAST_CACHE_GIB what its files may take. (fsspec's own caches have no bound.)
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import xxhash

from sbp_fast.errors import Unreachable, UserError
from sbp_fast.pipeline.files import TEMPORARY_SUFFIX

DIRECTORY, BOUND, DEFAULT_GIB = "SBP_FAST_CACHE", "SBP_FAST_CACHE_GIB", "32"
SIZE = "size"  # holds the sum of the files in bytes, and its lock
FILLED = 0.9  # of the bound is left when room is made, so that this is seldom


def open_cache() -> BlockCache | None:
    """The cache that the environment asks for, or None; UserError for a bound that is no number or an unusable directory."""
    bound = os.environ.get(BOUND, DEFAULT_GIB)
    if not (directory := os.environ.get(DIRECTORY)):
        return None
    try:
        limit = int(float(bound) * 2**30)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise UserError(f"{BOUND} = {bound}", "is no number of GiB", "set it to what the cache may take")
    return BlockCache(Path(directory), limit)


class BlockCache:
    """Blocks as they lie in the store, each in a file named by its checksum and size, which is checked when it is read.

    The files exceed the bound by no more than a block for each thread that is just writing one, and for each process that was
    killed in doing so since room was last made. The longest unused go first.

    Args:
        directory: made if it is not there; on a local disk.
        limit: bytes.

    Raises:
        UserError: the directory cannot be used, or the disk is full, now or later: it is never just gone on without.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory, self._limit = directory, limit
        with self._explained():
            directory.mkdir(parents=True, exist_ok=True)
            self._account(0)

    def read(self, xxh3: int, size: int) -> bytes | None:
        """The block with this xxh3-64 and size; None where it is not held, or was damaged and is now removed."""
        path = self._path(xxh3, size)
        with self._explained(), suppress(FileNotFoundError):  # not there, or just removed by another process
            stored = path.read_bytes()
            if len(stored) == size and xxhash.xxh3_64_intdigest(stored) == xxh3:
                os.utime(path)  # used last now
                return stored
            path.unlink()
        return None

    def keep(self, xxh3: int, stored: bytes) -> None:
        """Hold a block with this xxh3-64, and remove others if there is no room."""
        path = self._path(xxh3, len(stored))
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{uuid4().hex}{TEMPORARY_SUFFIX}")
            try:
                temporary.write_bytes(stored)
                with suppress(FileNotFoundError):  # another process made room with it
                    os.replace(temporary, path)  # not synced: what a power cut spoils is found out when read
            finally:
                temporary.unlink(missing_ok=True)
            self._account(len(stored))

    def _path(self, xxh3: int, size: int) -> Path:
        name = f"{xxh3:016x}-{size}"
        return self._directory / name[:2] / name  # few enough files in a folder for any file system

    def _account(self, added: int) -> None:
        with open(self._directory / SIZE, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = file.read()
            held = int(known) + added if known.isdigit() else math.inf
            held = self._make_room() if held > self._limit else held
            file.truncate(0)
            file.write(str(held).encode())

    def _make_room(self) -> int:
        """Remove what was unused longest until the files fit; returns what they take."""
        files = []
        for path in self._directory.glob("*/*"):
            with suppress(FileNotFoundError):
                facts = path.stat()
                files.append((facts.st_mtime_ns, facts.st_size, path))
        held = sum(size for _, size, _ in files)
        aim = self._limit if held <= self._limit else FILLED * self._limit
        for _, size, path in sorted(files):
            if held > aim:
                path.unlink(missing_ok=True)
                held -= size
        return held

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = f"give {DIRECTORY} a directory that you may write to, with room for {BOUND}, or unset it"
            raise Unreachable(self._directory, f"does not serve as a cache: {error.strerror}", remedy) from error
