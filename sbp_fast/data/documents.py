"""Raw documents, file by file: JSONL (plain, .gz, .zst), parquet and text files, local or behind an fsspec URL.

The order is that of the patterns given, each sorted by path. A record that cannot be used comes as the UserError that names
its file and line, in its place: a corpus that silently lacks part of what its owner gave would spoil every number that
follows.
"""

from __future__ import annotations

import importlib.resources
import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from sbp_fast.config import CorpusConfig
from sbp_fast.data.filesystem import open_system, user_errors
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import hash_file, hash_value

EMBEDDED = "embedded:"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
DEFAULT_SOURCE = "text"


@dataclass(frozen=True)
class Document:
    """One raw document; `where` names its file and record for messages."""

    id: str
    text: str
    source: str
    where: str


@dataclass(frozen=True)
class Span:
    """Part of a file (see `cutting.py`).

    Attributes:
        start, stop: of JSONL the bytes in which its lines begin, of parquet its row groups.
        before: of parquet the rows before it, of JSONL the ends of lines before the byte before it.
    """

    start: int
    stop: int
    before: int


@dataclass(frozen=True)
class File:
    """One input file, or a span of one: its file system, path there, the path or URL a person knows it by, and its parts below
    the directory that all files of the corpus have in common."""

    system: fsspec.AbstractFileSystem
    path: str
    shown: str
    parts: tuple[str, ...]
    span: Span | None = None


def read_file(file: File, config: CorpusConfig) -> Iterator[Document | UserError]:
    """Stream the documents of one file, in order.

    A record without an id is named after its file and line, "part-0.jsonl:17"; a text file is one document and named
    after itself, "letters:1862.txt". Such a name has no "/" and so no group: a folder is not taken for an original.

    Yields:
        Documents, and a UserError in place of each record that cannot be used; last, if the file is damaged or holds
        nothing, one that says so.
    """
    found = False
    try:
        # `user_errors` lies around the reading alone: what the consumer raises does not pass through a generator
        with user_errors(file.system, file.shown):
            for document in _read_records(file, config):
                found = True
                yield document
    except UserError as error:
        yield error
        return
    if not found and file.span is None:
        yield UserError(file.shown, "holds no documents", "give a file with documents, or leave this one out")


def find_files(path: str | tuple[str, ...]) -> list[File]:
    """The input files that a path, or several, stand for: each once, in a stable order."""
    found: dict[str, tuple[fsspec.AbstractFileSystem, str]] = {}
    patterns = (path,) if isinstance(path, str) else path
    if not all(patterns) or not patterns:
        raise UserError("corpus", "an empty path", "name the files, folders or URLs of the documents")
    for pattern in patterns:
        system, paths = _expand(pattern)
        found.update((system.unstrip_protocol(one), (system, one)) for one in paths)
    folders = [url.split("/")[:-1] for url in found]
    depth = next(
        (depth for depth, names in enumerate(zip(*folders, strict=False)) if len(set(names)) > 1), min(map(len, folders))
    )
    return [
        File(system, one, one if isinstance(system, LocalFileSystem) else url, tuple(url.split("/")[depth:]))
        for url, (system, one) in found.items()
    ]


def fingerprint_sources(path: str | tuple[str, ...]) -> str:
    """Hash of the raw input: names below the common directory and content; where that lies does not matter.

    A remote file is known by what its store says of it (`ukey`: an etag, a revision), without reading it.
    """
    facts = []
    for file in find_files(path):
        with user_errors(file.system, file.shown):
            content = (
                hash_file(Path(file.path)) if isinstance(file.system, LocalFileSystem) else str(file.system.ukey(file.path))
            )
        facts.append([list(file.parts), content])
    return hash_value(facts)


def group_of(id: str, separator: str, sources: Collection[str]) -> str:
    """The original that a document is part of: its id up to the last separator.

    An id without one is an original by itself, and so is one whose head merely names its source ("pubmed/3408").
    """
    head = head_of(id, separator)
    return id if head in sources else head


def head_of(id: str, separator: str) -> str:
    """An id up to its last separator, all of it where there is none."""
    head, found, _ = id.rpartition(separator) if separator else ("", "", id)
    return head if found else id


def _expand(pattern: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    if pattern.startswith(EMBEDDED):
        pattern = _embedded_file(pattern)
    system, path = open_system(pattern)
    with user_errors(system, pattern):
        if system.isfile(path):
            if not path.endswith(SUFFIXES):
                raise UserError(pattern, "not a kind of file that can be read", f"give one of {', '.join(SUFFIXES)}")
            return system, [path]
        if system.isdir(path):
            paths = [one for one in system.find(path) if one.endswith(SUFFIXES)]
            what = "the folder holds no documents"
        elif any(character in path for character in "*?["):
            paths = [one for one in system.glob(path) if one.endswith(SUFFIXES) and system.isfile(one)]
            what = "nothing matches"
        else:
            raise UserError(pattern, "no such file or folder", "correct the path")
    if not paths:
        raise UserError(pattern, what, f"correct the path; files that can be read end in {', '.join(SUFFIXES)}")
    return system, sorted(paths)


def _embedded_file(pattern: str) -> str:
    folder = importlib.resources.files("sbp_fast.data") / "embedded"
    file = folder / f"{pattern.removeprefix(EMBEDDED)}.jsonl.zst"
    if not file.is_file():
        names = sorted(one.name.removesuffix(".jsonl.zst") for one in folder.iterdir() if one.name.endswith(".jsonl.zst"))
        raise UserError(pattern, "no such embedded corpus", f"the embedded ones are {', '.join(names)}")
    return str(file)


def _read_records(file: File, config: CorpusConfig) -> Iterator[Document | UserError]:
    if file.path.endswith(".parquet"):
        yield from _read_parquet(file, config)
    elif file.path.endswith(".txt"):
        with file.system.open(file.path, "rb") as stream:
            text = _decode(stream.read(), file.shown)
        yield _document({config.text_field: text}, file, None, config)
    else:
        with file.system.open(file.path, "rb") as raw, _decompressed(raw, file.path) as stream:
            yield from _read_jsonl(stream, file, config)


def _decompressed(raw: IO[bytes], path: str) -> IO[bytes]:
    # not fsspec's own: it takes a truncated .zst for a whole one (pyarrow raises)
    for suffix, codec in ((".gz", "gzip"), (".zst", "zstd")):
        if path.endswith(suffix):
            return io.BufferedReader(pa.CompressedInputStream(raw, codec), 1 << 20)
    return raw


def _read_jsonl(stream: IO[bytes], file: File, config: CorpusConfig) -> Iterator[Document | UserError]:
    for number, line in _lines(stream, file.span):
        if line.isspace():
            continue
        try:
            yield _document(_parse(line, number, file), file, number, config)
        except UserError as error:
            yield error


def _lines(stream: IO[bytes], span: Span | None) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, or those that begin within a span, with their numbers in the file."""
    if span is None:
        yield from enumerate(stream, 1)
        return
    number, place = span.before, 0
    if span.start:
        place = stream.seek(span.start - 1)
        place += len(stream.readline())  # the end of a line that begins before
        number += 1
    while place < span.stop and (line := stream.readline()):
        number += 1
        yield number, line
        place += len(line)


def _parse(line: bytes, number: int, file: File) -> dict[str, Any]:
    where = f"{file.shown}, line {number}"
    try:
        record = json.loads(_decode(line, file.shown, number))
    except (ValueError, RecursionError) as error:
        reason = (
            f"{error.msg.removesuffix(' at')} at column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        raise UserError(where, f"malformed JSON: {reason}", "correct or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(where, "not a JSON object", 'write each document as an object such as {"text": "..."}')
    return record


def _read_parquet(file: File, config: CorpusConfig) -> Iterator[Document | UserError]:
    with file.system.open(file.path, "rb") as stream:
        table = pq.ParquetFile(stream)
        names = table.schema_arrow.names
        if config.text_field not in names:
            raise UserError(
                file.shown,
                f"has no column {config.text_field!r}",
                f"set corpus.text_field to the one that holds the text, of {', '.join(names)}",
            )
        wanted = [config.text_field, config.id_field, config.source_field]
        number = file.span.before if file.span else 0
        groups = range(file.span.start, file.span.stop) if file.span else None
        for batch in table.iter_batches(1024, groups, columns=[name for name in names if name in wanted]):
            for record in _rows(batch):
                number += 1
                try:
                    if record is None:
                        raise UserError(f"{file.shown}, row {number}", "not UTF-8 text", "convert it to UTF-8")
                    yield _document(record, file, number, config)
                except UserError as error:
                    yield error


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows of a batch, None for one whose text is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [record for row in range(len(batch)) for record in _rows(batch.slice(row, 1))] if len(batch) > 1 else [None]


def _document(record: dict[str, Any], file: File, number: int | None, config: CorpusConfig) -> Document:
    record_name = "row" if file.path.endswith(".parquet") else "line"
    where = file.shown if number is None else f"{file.shown}, {record_name} {number}"
    text = record.get(config.text_field)
    if not isinstance(text, str) or not text.strip():
        what = "an empty text" if isinstance(text, str) else "no text" if text is None else "a text that is no string"
        raise UserError(
            where, f"a record with {what} ({config.text_field!r})", "correct or remove it, or set corpus.text_field"
        )
    name = ":".join(file.parts) if number is None else ":".join([*file.parts, str(number)])
    id, source = record.get(config.id_field), record.get(config.source_field)
    id = name if id is None or id == "" else str(id)
    source = DEFAULT_SOURCE if source is None or source == "" else str(source)
    for value, what in ((text, "text"), (id, "id"), (source, "source")):
        _require_unicode(value, what, where)
    return Document(id, text, source, where)


def _require_unicode(value: str, what: str, where: str) -> None:
    if value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"half a surrogate pair at character {error.start} of its {what} stands for nothing"
        raise UserError(where, found, "correct or remove the record") from None


def _decode(line: bytes, shown: str, number: int | None = None) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = number or line.count(b"\n", 0, error.start) + 1
        raise UserError(f"{shown}, line {at}", "not UTF-8 text", "convert the file to UTF-8, as with iconv") from None
