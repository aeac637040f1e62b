"""A bounded cache on local disk for the blocks of remote corpora, which all processes of a machine share.

SBP_FAST_CACHE names the directory, SBP_FAST_CACHE_GIB bounds its files. (The caches of fsspec have no bound.)
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

from sbp_fast.errors import TransientError, UserError
from sbp_fast.pipeline.files import TEMPORARY_SUFFIX

DIRECTORY, BOUND, DEFAULT_GIB = "SBP_FAST_CACHE", "SBP_FAST_CACHE_GIB", "32"
SIZE = "size"  # file that holds the sum of the files' sizes in bytes, and serves as its lock
FILLED = 0.9  # share of the bound left after eviction, so that eviction is rare


def open_cache() -> BlockCache | None:
    """Return the cache that the environment asks for, or None.

    Raises:
        UserError: a bound that is no number, or an unusable directory.
    """
    bound = os.environ.get(BOUND, DEFAULT_GIB)
    if not (directory := os.environ.get(DIRECTORY)):
        return None
    try:
        limit = int(float(bound) * 2**30)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise UserError(f"{BOUND} = {bound}", "is no number of GiB", "set it to the space that the cache may take")
    return BlockCache(Path(directory), limit)


class BlockCache:
    """Blocks as they are stored, each in a file named by its checksum and size; a file is checked when it is read.

    The files exceed the bound by at most one block for each thread that is writing one, and for each process that was killed
    while writing one since the last eviction. The least recently used are evicted first.

    Args:
        directory: on a local disk; created if it does not exist.
        limit: bytes.

    Raises:
        UserError: the directory cannot be used, or the disk is full, now or later; reading never goes on without the cache.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory, self._limit = directory, limit
        with self._explain_errors():
            directory.mkdir(parents=True, exist_ok=True)
            self._account(0)

    def read(self, xxh3: int, size: int) -> bytes | None:
        """Return the block with this xxh3-64 and size; None if it is not cached, or was damaged and is now removed."""
        path = self._path(xxh3, size)
        with self._explain_errors(), suppress(FileNotFoundError):  # not cached, or just removed by another process
            stored = path.read_bytes()
            if len(stored) == size and xxhash.xxh3_64_intdigest(stored) == xxh3:
                os.utime(path)  # most recently used
                return stored
            path.unlink()
        return None

    def keep(self, xxh3: int, stored: bytes) -> None:
        """Cache a block with this xxh3-64, and evict others if there is no room."""
        path = self._path(xxh3, len(stored))
        with self._explain_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{uuid4().hex}{TEMPORARY_SUFFIX}")
            try:
                temporary.write_bytes(stored)
                with suppress(FileNotFoundError):  # another process evicted it
                    os.replace(temporary, path)  # not synced: damage by a power loss is detected when it is read
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
            recorded = file.read()
            size = int(recorded) + added if recorded.isdigit() else math.inf
            size = self._evict() if size > self._limit else size
            file.truncate(0)
            file.write(str(size).encode())

    def _evict(self) -> int:
        """Remove the least recently used files until the others fit; returns their size in bytes."""
        files = []
        for path in self._directory.glob("*/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        aim = self._limit if total <= self._limit else FILLED * self._limit
        for _, size, path in sorted(files):
            if total > aim:
                path.unlink(missing_ok=True)
                total -= size
        return total

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = f"give {DIRECTORY} a directory that you may write to, with room for {BOUND}, or unset it"
            raise TransientError(self._directory, f"does not serve as a cache: {error.strerror}", remedy) from error
