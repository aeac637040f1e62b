"""Checksums beside what a later attempt, or another stage, accepts: JSON that carries its own hash, and markers of files.

A marker says that an earlier attempt finished some files. It holds their checksums and values that belong to them. A marker
that is damaged, or one of whose files is, counts as absent: the files are named and made again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import dump_json, hash_file, hash_value, parse_json, read_json, write_json
from sbp_fast.pipeline.progress import Console

HASH = "xxh3"
SEAL_SUFFIX = ".seal.json"


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with the hash of all its other entries under the key "xxh3", atomically."""
    entries = parse_json(dump_json(dict(value), path))  # as they will be read
    write_json(path, {**entries, HASH: hash_value(entries)})


def read_sealed_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return what `write_sealed_json` wrote, without the hash.

    Args:
        path: of the file.
        remedy: for the message about a damaged file.

    Raises:
        UserError: the file is missing or not as it was written.
    """
    try:
        entries = read_json(path)
    except (OSError, UserError):
        entries = None
    if not isinstance(entries, dict) or entries.pop(HASH, None) != hash_value(entries):
        raise UserError(path, "missing or damaged since it was written", remedy)
    return entries


def fingerprint_file(path: Path) -> dict[str, Any]:
    """Return the size and the checksum of a file: {"bytes", "xxh3"}."""
    return {"bytes": path.stat().st_size, HASH: hash_file(path)}


def is_whole(path: Path, expected: Mapping[str, Any], *, hashed: bool = True) -> bool:
    """Return whether a file has the size, and if `hashed` the checksum, that `fingerprint_file` returned."""
    same_size = path.is_file() and path.stat().st_size == expected["bytes"]
    return same_size and (not hashed or hash_file(path) == expected[HASH])


def begins_whole(path: Path, expected: Mapping[str, Any]) -> bool:
    """Return whether a file that grows still begins with the bytes that `fingerprint_file` was called on."""
    size = expected["bytes"]
    return path.is_file() and path.stat().st_size >= size and hash_file(path, size) == expected[HASH]


def write_marker(path: Path, files: Iterable[Path] = (), **values: Any) -> None:
    """Mark files as finished, with values that belong to them."""
    fingerprints = {os.path.relpath(file, path.parent): fingerprint_file(file) for file in files}
    write_sealed_json(path, {"values": values, "files": fingerprints})


def read_marker(path: Path) -> dict[str, Any] | None:
    """Return the values of a marker if it and all its files are as they were written; None if not, or if there is none."""
    if not path.is_file():
        return None
    damaged: Path | None = path
    try:
        marker = read_sealed_json(path, "")
    except UserError:
        marker = None
    if marker is not None:
        files = {path.parent / name: expected for name, expected in marker["files"].items()}
        damaged = next((file for file, expected in files.items() if not is_whole(file, expected)), None)
        if damaged is None:
            return marker["values"]
    Console().say(f"{os.path.normpath(damaged or path)}: missing or damaged since it was written, and so made again")
    path.unlink()
    return None


def marker_values(path: Path) -> dict[str, Any]:
    """Return the values of a marker whose files this attempt has written or checked.

    Raises:
        UserError: it is missing or damaged.
    """
    return read_sealed_json(path, "run again")["values"]


def seal(path: Path, *others: Path) -> None:
    """Write a marker beside a file that has none of its own; `is_sealed` then accepts it, with the others."""
    write_marker(_seal_path(path), [path, *others])


def is_sealed(path: Path) -> bool:
    """Return whether an earlier attempt sealed a file, and it and those sealed with it are as they were written."""
    return read_marker(_seal_path(path)) is not None


def remove_sealed(path: Path) -> None:
    """Remove a file and its seal, where they are."""
    for file in (path, _seal_path(path)):
        file.unlink(missing_ok=True)


def _seal_path(path: Path) -> Path:
    return path.with_name(path.name + SEAL_SUFFIX)
