"""The path of an output: resolved and checked before any work, locked against a second process, its disk errors in one line."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sbp_fast.errors import UserError
from sbp_fast.pipeline.interrupts import Interrupted

PARTIAL_SUFFIX = ".partial"
LONGEST_SUFFIX = len(".checkpoints")  # of what is written beside an output
LONGEST_FILE = 200  # characters of a path inside an output
LOCKS = Path("/proc/locks")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EROFS, errno.EPERM}
NO_PATH = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EISDIR}


def resolve_output(out: Path) -> Path:
    """Return the path to write an output to: `out`, or where it leads if it is a symbolic link.

    Raises:
        UserError: it or its partial directory cannot be a directory of this name here.
    """
    resolved = Path(os.path.realpath(out)) if out.is_symlink() or out.name in ("", "..") else out
    if resolved.is_symlink() or not resolved.name:
        raise UserError(out, "is no place for a directory", "choose another --out")
    parent = next(parent for parent in resolved.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(parent, "is a file, and the output is to lie in it", "choose another --out")
    name_limit, path_limit = (os.pathconf(parent, key) for key in ("PC_NAME_MAX", "PC_PATH_MAX"))
    added = (part for part in resolved.absolute().parts[len(parent.parts) :])
    longest = max((len(os.fsencode(part)) for part in added), default=0) + LONGEST_SUFFIX
    if longest > name_limit or len(os.fsencode(resolved.absolute())) + LONGEST_SUFFIX + LONGEST_FILE > path_limit:
        raise UserError(out, f"is too long: a name may have {name_limit - LONGEST_SUFFIX} bytes here", "choose another --out")
    partial = partial_path(resolved)
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise UserError(partial, "is no directory of an earlier attempt, but a link or a file", "remove it")
    return resolved


def partial_path(out: Path) -> Path:
    """Return the directory in which an output is made."""
    return out.with_name(out.name + PARTIAL_SUFFIX)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock an output against a second process; the lock ends with the block, or with this process where that is interrupted.

    The lock file is removed by the process that holds the lock. A lock on a file that is no longer at the path, because its
    holder has removed it, therefore counts for nothing, and the next file is locked.

    Raises:
        UserError: another process holds the lock, or something else lies at the path of the lock file.
    """
    path = _lock_path(out)
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            raise UserError(path, "is no lock file, but a link or a directory", "remove it") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(out, "another process is writing it", "wait for it, or choose another --out") from None
        if _is_at(file, path):
            break
        os.close(file)
    try:
        yield
    except Interrupted:  # threads may write to the end of this process, which comes now and releases the lock
        raise
    except BaseException:
        _release(file, path)
        raise
    _release(file, path)


def is_locked(out: Path) -> bool:
    """Return whether a process of this machine holds the lock of an output.

    The lock is not touched: an attempt to take it could make a stage fail that begins at the same moment. Systems without
    `/proc/locks` only tell whether a lock file is there, which a killed process leaves behind.
    """
    try:
        inode = _lock_path(out).lstat().st_ino
    except FileNotFoundError:
        return False
    if not LOCKS.is_file():
        return True
    fields = (line.split() for line in LOCKS.read_text().splitlines())
    return any(part.endswith(f":{inode}") for parts in fields for part in parts)  # MAJOR:MINOR:INODE


def _lock_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")


def _release(file: int, path: Path) -> None:
    path.unlink(missing_ok=True)  # while the lock is held: see `locked`
    os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Return whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def disk_errors_are_user_errors(out: Path) -> Iterator[None]:
    """Turn the error of a full or write-protected disk, or of an impossible path, into a UserError about `out`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number, path = _disk_error(error)
        problem = f"cannot be written: {os.strerror(number)}"
        if number in FULL:
            raise UserError(out, problem, "free some space and rerun: it resumes where it stopped") from error
        if number in REFUSED:
            raise UserError(path or out, problem, "choose a directory that you may write to") from error
        if number in NO_PATH and isinstance(error, OSError):
            raise UserError(path or out, problem, "choose another output directory") from error
        raise


def _disk_error(error: BaseException) -> tuple[int, str | None]:
    """Return the error number and the file of the OSError behind an error; 0 and None if there is none.

    Libraries in other languages raise exceptions of their own. Those in Rust (safetensors, tokenizers) have the number in their
    text; torch raises its own after the OSError of the file that it wrote to.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno:
            return seen.errno, seen.filename
        if match := re.search(r"\(os error (\d+)\)", str(seen)):
            return int(match[1]), None
        seen = seen.__cause__ or seen.__context__
    return 0, None
