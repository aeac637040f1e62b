"""Raw documents, file by file, local or behind an fsspec URL; `sbp_fast.data.readers` has the formats.

Files come in the order of the given patterns, those of one pattern sorted by path. A record that cannot be used is returned
in its place as a UserError that names its file and line: a corpus that silently lacked some of its documents would spoil
every number that follows.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from sbp_fast.config import CorpusConfig
from sbp_fast.data.filesystem import open_system, user_errors
from sbp_fast.data.readers import READERS, Fields, InputFile, Record, find_reader
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import hash_file, hash_value

EMBEDDED = "embedded:"
DEFAULT_SOURCE = "text"


@dataclass(frozen=True)
class Document:
    """One raw document; `where` names its file and record for messages."""

    id: str
    text: str
    source: str
    where: str


def read_file(file: InputFile, config: CorpusConfig) -> Iterator[Document | UserError]:
    """Stream the documents of one file or split, in order.

    A record without an id is named after its file and line, "part-0.jsonl:17"; a text file is one document, named after
    itself, "letters:1862.txt". Such a name has no "/", so that no folder is taken for an original that documents share.

    Yields:
        Documents, and a UserError in place of each record that cannot be used; last, if the file is damaged or holds
        nothing, one that says so.
    """
    fields = Fields(config.text_field, config.id_field, config.source_field)
    empty = True
    try:
        # `user_errors` encloses the reading alone: an exception of the consumer does not pass through a generator
        with user_errors(file.system, file.shown):
            for record in file.reader.read(file, fields):
                empty = False
                yield record if isinstance(record, UserError) else _make_document(record, file, fields)
    except UserError as error:
        yield error
        return
    if empty and file.split is None:
        yield UserError(file.shown, "holds no documents", "give a file with documents, or leave this one out")


def find_files(path: str | tuple[str, ...]) -> list[InputFile]:
    """Return the input files that one or several paths stand for, each once, in a stable order.

    Args:
        path: files, globs, folders (searched recursively for suffixes that have a reader), fsspec URLs, or an embedded
            corpus such as "embedded:default".

    Raises:
        UserError: a path that is empty, does not exist, matches nothing, or has no reader.
    """
    files: dict[str, tuple[fsspec.AbstractFileSystem, str]] = {}
    patterns = (path,) if isinstance(path, str) else path
    if not all(patterns) or not patterns:
        raise UserError("corpus", "an empty path", "name the files, folders or URLs of the documents")
    for pattern in patterns:
        system, paths = _expand(pattern)
        files.update((system.unstrip_protocol(name), (system, name)) for name in paths)
    folders = [url.split("/")[:-1] for url in files]
    depth = next(
        (depth for depth, names in enumerate(zip(*folders, strict=False)) if len(set(names)) > 1), min(map(len, folders))
    )
    return [_describe(system, name, url, depth) for url, (system, name) in files.items()]


def fingerprint_sources(path: str | tuple[str, ...]) -> str:
    """Hash the raw input: content, and names below the common directory. Where that directory lies does not matter.

    A remote file is identified by what its store says of it (`ukey`: an etag, a revision), without reading it.
    """
    contents = []
    for file in find_files(path):
        with user_errors(file.system, file.shown):
            content = hash_file(Path(file.path)) if file.local else str(file.system.ukey(file.path))
        contents.append([list(file.parts), content])
    return hash_value(contents)


def is_embedded(corpus: CorpusConfig) -> bool:
    """Return whether the documents are the ones that come with the package."""
    return isinstance(corpus.path, str) and corpus.path.startswith(EMBEDDED)


def heldout_path(corpus: CorpusConfig) -> str | tuple[str, ...] | None:
    """Return where the held-out documents are read from; None if a part of the others is to be held out."""
    if corpus.heldout != "auto":
        return corpus.heldout
    return f"{corpus.path}_heldout" if is_embedded(corpus) else None


def group_of(id: str, separator: str, sources: Collection[str]) -> str:
    """Return the original that a document is part of: its id up to the last separator.

    A document whose id has no separator is an original by itself, and so is one whose id merely begins with the name of its
    source ("pubmed/3408").
    """
    head = head_of(id, separator)
    return id if head in sources else head


def head_of(id: str, separator: str) -> str:
    """Return an id up to its last separator, the whole id where there is none."""
    head, separated, _ = id.rpartition(separator) if separator else ("", "", id)
    return head if separated else id


def _expand(pattern: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    if pattern.startswith(EMBEDDED):
        pattern = _embedded_file(pattern)
    system, path = open_system(pattern)
    with user_errors(system, pattern):
        if system.isfile(path):
            if find_reader(path) is None:
                raise UserError(pattern, "not a kind of file that can be read", f"give one of {', '.join(READERS)}")
            return system, [path]
        if system.isdir(path):
            paths = [name for name in system.find(path) if find_reader(name)]
            problem = "the folder holds no documents"
        elif any(character in path for character in "*?["):
            paths = [name for name in system.glob(path) if find_reader(name) and system.isfile(name)]
            problem = "nothing matches"
        else:
            raise UserError(pattern, "no such file or folder", "correct the path")
    if not paths:
        raise UserError(pattern, problem, f"correct the path; files that can be read end in {', '.join(READERS)}")
    return system, sorted(paths)


def _describe(system: fsspec.AbstractFileSystem, path: str, url: str, depth: int) -> InputFile:
    reader = find_reader(path)
    assert reader is not None
    shown = path if isinstance(system, LocalFileSystem) else url
    return InputFile(system, path, shown, tuple(url.split("/")[depth:]), reader)


def _embedded_file(pattern: str) -> str:
    folder = importlib.resources.files("sbp_fast.data") / "embedded"
    file = folder / f"{pattern.removeprefix(EMBEDDED)}.jsonl.zst"
    if not file.is_file():
        names = sorted(item.name.removesuffix(".jsonl.zst") for item in folder.iterdir() if item.name.endswith(".jsonl.zst"))
        raise UserError(pattern, "no such embedded corpus", f"the embedded ones are {', '.join(names)}")
    return str(file)


def _make_document(record: Record, file: InputFile, fields: Fields) -> Document | UserError:
    where = file.shown if record.index is None else f"{file.shown}, {file.reader.record_name} {record.index}"
    text = record.values.get(fields.text)
    if not isinstance(text, str) or not text.strip():
        problem = "an empty text" if isinstance(text, str) else "no text" if text is None else "a text that is no string"
        remedy = "correct or remove it, or set corpus.text_field"
        return UserError(where, f"a record with {problem} ({fields.text!r})", remedy)
    name = ":".join(file.parts) if record.index is None else ":".join([*file.parts, str(record.index)])
    id, source = record.values.get(fields.id), record.values.get(fields.source)
    id = name if id is None or id == "" else str(id)
    source = DEFAULT_SOURCE if source is None or source == "" else str(source)
    for value, kind in ((text, "text"), (id, "id"), (source, "source")):
        position = _lone_surrogate(value)
        if position is not None:
            problem = f"half a surrogate pair at character {position} of its {kind} stands for nothing"
            return UserError(where, problem, "correct or remove the record")
    return Document(id, text, source, where)


def _lone_surrogate(value: str) -> int | None:
    """Return the position of a character that UTF-8 cannot encode, if there is one."""
    if value.isascii():
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
