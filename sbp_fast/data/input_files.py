"""Input files that paths, globs, folders and URLs stand for, and the names that were left out, each with the reason.

Files come in the order of the given paths, those of one path sorted. Nothing is left out in silence: `FoundFiles.left_out` has
the names, and a file that the user named himself is read or refused.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from sbp_fast.data.filesystem import open_system, user_errors
from sbp_fast.data.readers import READERS, InputFile, find_reader
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import hash_file, hash_value

EMBEDDED = "embedded:"
HIDDEN = (".", "_")
MAGIC = "*?["
NAMES_SHOWN = 3  # of those left out for one reason
HIDDEN_NAMES = 'hidden names, which begin with "." or "_"'
LINKED_FOLDERS = "linked folders (name them to read them)"


def shorten(names: Sequence[str]) -> str:
    """Return the first of some names, for a message."""
    return ", ".join([*names[:NAMES_SHOWN], *(["..."] if len(names) > NAMES_SHOWN else [])])


@dataclass
class FoundFiles:
    """Input files, and what lies beside them and is not read.

    Attributes:
        files: each once, in a stable order.
        left_out: reason -> names below the given path.
    """

    files: list[InputFile] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, names: Iterable[str]) -> None:
        """Add names that are left out."""
        if names := sorted(names):
            self.left_out.setdefault(reason, []).extend(names)

    def describe(self) -> list[str]:
        """Return a line for each reason, with how many names were left out for it and the first of them."""
        return [f"left out {len(names)}: {reason}: {shorten(names)}" for reason, names in self.left_out.items()]


def search_files(path: str | tuple[str, ...]) -> FoundFiles:
    """Return the input files that one or several paths stand for, and what was left out.

    Args:
        path: files, globs, folders (searched recursively for suffixes that have a reader), fsspec URLs, or an embedded
            corpus such as "embedded:default".

    Raises:
        UserError: a path that is empty, does not exist, matches nothing, or has no reader.
    """
    found, files = FoundFiles(), dict[str, InputFile]()
    patterns = (path,) if isinstance(path, str) else path
    if not all(patterns) or not patterns:
        raise UserError("corpus", "an empty path", "name the files, folders or URLs of the documents")
    for pattern in patterns:
        for file in _expand(pattern, found):
            url = file.system.unstrip_protocol(file.path)
            files[url] = replace(file, named=True) if url in files and file.named else files.get(url, file)
    folders = [url.split("/")[:-1] for url in files]
    depth = next(
        (depth for depth, names in enumerate(zip(*folders, strict=False)) if len(set(names)) > 1), min(map(len, folders))
    )
    found.files = [replace(file, parts=tuple(url.split("/")[depth:])) for url, file in files.items()]
    return found


def find_files(path: str | tuple[str, ...]) -> list[InputFile]:
    """Return the input files that one or several paths stand for (see `search_files`)."""
    return search_files(path).files


def fingerprint_sources(path: str | tuple[str, ...]) -> str:
    """Hash the raw input: content, and names below the common directory. Where that directory lies does not matter.

    A remote file is identified by what its store says of it (`ukey`: an etag, a revision), without reading it.
    """
    contents = []
    for file in find_files(path):
        contents.append([list(file.parts), _identify(file, file.path)])
        contents += [[path.removeprefix(file.path.rpartition("/")[0]), _identify(file, path)] for path in file.companions()]
    return hash_value(contents)


def _identify(file: InputFile, path: str) -> str:
    """Return what changes with the content of a file, or of one that belongs to it."""
    with user_errors(file.system, file.shown):
        return hash_file(Path(path)) if file.local else str(file.system.ukey(path))


def _expand(pattern: str, found: FoundFiles) -> list[InputFile]:
    if pattern.startswith(EMBEDDED):
        pattern = _embedded_file(pattern)
    system, path = open_system(pattern)
    with user_errors(system, pattern):
        if system.isfile(path):
            if find_reader(path) is None:
                raise UserError(pattern, "not a kind of file that can be read", f"give one of {', '.join(READERS)}")
            return [_describe(system, path, named=True)]
        if system.isdir(path):
            names, problem = _list_folder(system, path, found), "the folder holds no documents"
            paths = _select(names, path, "", found)
        elif any(character in path for character in MAGIC):
            names, problem = _list_glob(system, path, found), "nothing matches"
            root, asked = _divide(path)
            paths = _select(names, root, asked, found)
        else:
            raise UserError(pattern, "no such file or folder", "correct the path")
    if not paths:
        also = "".join(f" ({line})" for line in found.describe())
        raise UserError(pattern, f"{problem}{also}", f"correct the path; files that can be read end in {', '.join(READERS)}")
    return [_describe(system, name) for name in sorted(paths)]


def _list_folder(system: fsspec.AbstractFileSystem, path: str, found: FoundFiles) -> list[str]:
    """Return all files in a folder; linked folders of this machine are left out."""
    if not isinstance(system, LocalFileSystem):
        return list(system.find(path))

    def refuse(error: OSError) -> None:
        raise error

    paths = []
    for folder, folders, files in os.walk(path, onerror=refuse):
        below = {name: os.path.relpath(os.path.join(folder, name), path) for name in folders}
        hidden = {name for name in folders if name.startswith(HIDDEN)}
        linked = {name for name in folders if os.path.islink(os.path.join(folder, name))} - hidden
        found.leave_out(HIDDEN_NAMES, (f"{below[name]}/" for name in hidden))
        found.leave_out(LINKED_FOLDERS, (f"{below[name]}/" for name in linked))
        folders[:] = [name for name in folders if name not in hidden | linked]
        broken = {name for name in files if not os.path.exists(os.path.join(folder, name))}
        found.leave_out("links to nothing", (os.path.relpath(os.path.join(folder, name), path) for name in broken))
        paths += [os.path.join(folder, name) for name in files if name not in broken]
    return paths


def _list_glob(system: fsspec.AbstractFileSystem, path: str, found: FoundFiles) -> list[str]:
    """Return all files that a glob matches; matching folders are left out, unless "**" stands for what is in them."""
    matching = system.glob(path)
    files = [name for name in matching if system.isfile(name)]
    folders = {name for name in matching if system.isdir(name)}
    found.leave_out("links to nothing", map(_last, set(matching) - set(files) - folders))
    if "**" in path:
        folders = {name for name in folders if isinstance(system, LocalFileSystem) and os.path.islink(name)}
        found.leave_out(LINKED_FOLDERS, map(_last, folders))
    else:
        found.leave_out("folders that the glob matches (add /** to read what is in them)", map(_last, folders))
    return files


def _divide(pattern: str) -> tuple[str, str]:
    """Return the folder in which a glob begins to match, and the rest of it."""
    parts = pattern.split("/")
    first = next(index for index, part in enumerate(parts) if any(character in part for character in MAGIC))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _select(paths: list[str], root: str, asked: str, found: FoundFiles) -> list[str]:
    """Return the files that are read among those found below a folder.

    Args:
        paths: of all files found.
        root: the folder.
        asked: the glob that was matched there, which may ask for hidden names itself; "" for a folder.
        found: receives what is left out.
    """
    hidden = tuple(mark for mark in HIDDEN if not any(part.startswith(mark) for part in asked.split("/")))
    below = {path: path.removeprefix(root).lstrip("/") for path in paths}
    visible = (
        [path for path in paths if not any(part.startswith(hidden) for part in below[path].split("/"))] if hidden else paths
    )
    found.leave_out(HIDDEN_NAMES, (below[path] for path in set(paths) - set(visible)))
    readers = {path: find_reader(path) for path in visible}
    readable = {path: reader for path, reader in readers.items() if reader is not None}
    belonging = {companion for path, reader in readable.items() for companion in reader.companions(path)}
    unknown = (below[path] for path, reader in readers.items() if reader is None and path not in belonging)
    found.leave_out("files of a kind that cannot be read", unknown)
    if all(reader.whole_files for reader in readable.values()):
        return list(readable)
    texts = (below[path] for path, reader in readable.items() if reader.whole_files)
    found.leave_out("text files beside files of records (name them to read them)", texts)
    return [path for path, reader in readable.items() if not reader.whole_files]


def _describe(system: fsspec.AbstractFileSystem, path: str, *, named: bool = False) -> InputFile:
    reader = find_reader(path)
    assert reader is not None
    shown = path if isinstance(system, LocalFileSystem) else system.unstrip_protocol(path)
    return InputFile(system, path, shown, (), reader, named=named)


def _last(path: str) -> str:
    return PurePosixPath(path).name


def _embedded_file(pattern: str) -> str:
    folder = importlib.resources.files("sbp_fast.data") / "embedded"
    file = folder / f"{pattern.removeprefix(EMBEDDED)}.jsonl.zst"
    if not file.is_file():
        names = sorted(item.name.removesuffix(".jsonl.zst") for item in folder.iterdir() if item.name.endswith(".jsonl.zst"))
        raise UserError(pattern, "no such embedded corpus", f"the embedded ones are {', '.join(names)}")
    return str(file)
