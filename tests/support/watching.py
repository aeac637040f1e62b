"""What a test sees of a command from outside: its processes, its files and its lock."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def group_members(group: int) -> list[int]:
    """Return the running processes of a process group."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(process_group) == group and state != "Z":
                members.append(int(entry.name))
    return members


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of the last change of all files in a directory, or in its partial directory."""
    files = {}
    for path in sorted([*directory.rglob("*"), *directory.with_name(directory.name + ".partial").rglob("*")]):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if path.is_file():
            files[str(path)] = (status.st_size, status.st_mtime_ns)
    return files


def is_locked(out: Path) -> bool:
    """Return whether a process holds the lock of an output."""
    try:
        file = os.open(out.with_name(f".{out.name}.lock"), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
