"""Writing files so that a reader never sees half of one: temporary name, sync, rename. JSON holds finite numbers only."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from sbp_fast.errors import UserError
from sbp_fast.pipeline.finite import require_finite

TEMPORARY_SUFFIX = ".tmp"
_writer = ""


def name_temporaries(writer: str) -> None:
    """Put `writer` into the names of this process's temporary files from now on.

    For processes of which two may write the same file at a time. The temporary file of a killed process then has a name that no
    later attempt uses; `run_stage` removes it.
    """
    global _writer
    _writer = f".{writer}"


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it is synced and renamed to `path`, on failure it is removed.

    For libraries that require a file name; otherwise use `atomic_open`.
    """
    temporary = path.with_name(path.name + _writer + TEMPORARY_SUFFIX)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for binary writing; the file appears under its name only when whole and on disk."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as numpy does, atomically."""

    class Written:
        """An object that is no file: to a file numpy would write without Python, and not report a full disk."""

        write = staticmethod(lambda part: file.write(part))

    with atomic_open(path) as file:
        np.save(Written(), array, allow_pickle=False)


def link(source: Path, path: Path) -> None:
    """Give a finished file a second name, atomically; `path` becomes a copy where the file system has no hard links.

    For files that are only ever replaced, never written into.
    """
    temporary = path.with_name(path.name + _writer + TEMPORARY_SUFFIX)
    try:
        os.link(source, temporary)
    except OSError:
        with atomic_path(path) as copy:
            shutil.copyfile(source, copy)
    else:
        os.replace(temporary, path)
        temporary.unlink(missing_ok=True)  # still there if `path` was this file before
        sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; floats round-trip exactly.

    Raises:
        UserError: it holds a number that is not finite; the message names the key.
    """
    with atomic_open(path) as file:
        file.write((dump_json(value, path, ensure_ascii=False, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        UserError: it holds no JSON, or a number that is not finite.
    """
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(path, f"is not JSON: {error}", "make it again") from None


def dump_json(value: Any, where: object, *, ensure_ascii: bool = True, **options: Any) -> str:
    """Return `value` as JSON text.

    Args:
        value: representable in JSON.
        where: what is written, for the message.
        ensure_ascii: whether other characters are escaped; a lone surrogate can be written in no other way.
        options: of `json.dumps`.

    Raises:
        UserError: it holds a number that is not finite.
    """
    require_finite(value, where)
    return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False, **options)


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        ValueError: it is none, or holds NaN or an infinity.
    """
    try:
        return DECODER.decode(content if isinstance(content, str) else content.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no finite number")


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_float)


def hash_file(path: Path, size: int | None = None) -> str:
    """Return the xxh3-128 hash of a file's bytes, or of the first `size` of them, as hex."""
    digest, left = xxhash.xxh3_128(), math.inf if size is None else size
    with open(path, "rb") as file:
        while block := file.read(int(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def hash_value(value: Any) -> str:
    """Return the xxh3-128 hash of a JSON-representable value in canonical form, as hex."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return xxhash.xxh3_128_hexdigest(canonical.encode())
