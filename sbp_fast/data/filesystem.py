"""Access to local paths and fsspec URLs, with one clear error when a file cannot be reached or read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import xxhash
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from sbp_fast.errors import TransientError, UserError

EXTRAS = {"s3": "sbp-fast[s3]", "s3a": "sbp-fast[s3]"}
UNREADABLE = (OSError, EOFError, pa.ArrowException)  # raised by storage, decompression and parquet on damaged input
HASH_BYTES = 1 << 22  # read at once
REMAKE = "it is damaged: make the corpus again"


def open_system(pattern: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path there.

    Raises:
        UserError: a URL that fsspec does not know, or whose package is not installed.
    """
    try:
        return url_to_fs(pattern)
    except ImportError as error:
        protocol = str(split_protocol(pattern)[0])
        remedy = f"pip install '{EXTRAS[protocol]}'" if protocol in EXTRAS else str(error)
        raise UserError(pattern, f"the package that reads {protocol}:// is not installed", remedy) from None
    except ValueError as error:
        raise UserError(pattern, str(error), "give a path or a URL that fsspec knows") from None
    except Exception as error:  # noqa: BLE001  (a file system that connects or opens an archive at once raises what it likes)
        what = f"cannot be opened: {str(error) or type(error).__name__}"
        raise UserError(pattern, what, "correct the URL, or copy the files to this machine") from None


@contextmanager
def user_errors(system: fsspec.AbstractFileSystem, shown: str) -> Iterator[None]:
    """Turn the exceptions of a file system into a UserError about `shown`, TransientError if the store failed."""
    # the clients of remote stores raise exceptions without a common base class
    expected = UNREADABLE if isinstance(system, LocalFileSystem) else (Exception,)
    try:
        yield
    except UserError:
        raise
    except expected as error:
        damaged = isinstance(system, LocalFileSystem) or isinstance(error, (EOFError, pa.ArrowException))
        kind = UserError if damaged else TransientError
        what = f"cannot be read: {error or type(error).__name__}"
        raise kind(shown, what, "check that it is whole, within reach and yours to read") from error


class Folder:
    """A folder of files to read, local or behind a URL.

    Args:
        location: a path or a URL.

    Attributes:
        local: whether its files can be memory-mapped.
    """

    def __init__(self, location: str | Path) -> None:
        self._shown = str(location).rstrip("/")
        self._system, self._path = (
            open_system(self._shown) if "://" in self._shown else (LocalFileSystem(), str(Path(location).absolute()))
        )
        self.local = isinstance(self._system, LocalFileSystem)

    def where(self, name: str) -> str:
        """Return the path or URL of a file, for messages."""
        return f"{self._shown}/{name}"

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, None if there is no such file."""
        with user_errors(self._system, self.where(name)):
            return int(self._system.size(self._full(name))) if self._system.isfile(self._full(name)) else None

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return the bytes of a file, or of [start, stop), fewer if it ends before.

        Raises:
            UserError: a file that is missing or cannot be read.
        """
        with user_errors(self._system, self.where(name)):
            return bytes(self._system.cat_file(self._full(name), start, stop))

    def read_checked(self, name: str, xxh3: str) -> bytes:
        """Return the bytes of a file, which must have this xxh3-128.

        Raises:
            UserError: a file that is missing or not as it was written.
        """
        content = self.read(name) if self.size(name) is not None else b""
        if xxhash.xxh3_128_hexdigest(content) != xxh3:
            raise UserError(self.where(name), "missing or not as it was written", REMAKE)
        return content

    def hash(self, name: str) -> str:
        """Return the xxh3-128 of a file as hex, "" if there is no such file."""
        if self.size(name) is None:
            return ""
        digest = xxhash.xxh3_128()
        with user_errors(self._system, self.where(name)), self._system.open(self._full(name), "rb") as file:
            while block := file.read(HASH_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def map(self, name: str, dtype: np.dtype | str) -> np.ndarray:
        """Memory-map a local file as a one-dimensional array."""
        with user_errors(self._system, self.where(name)):
            size = Path(self._full(name)).stat().st_size
            # a plain array over the map: slicing np.memmap takes five times as long
            return np.asarray(np.memmap(self._full(name), dtype, "r")) if size else np.zeros(0, dtype)

    def _full(self, name: str) -> str:
        return f"{self._path}/{name}"
