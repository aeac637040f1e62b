"""Raw documents as one stream: JSONL (plain, .gz, .zst), parquet and text files, local or behind an fsspec URL.

The order is that of the patterns given, each sorted by path. A record that cannot be used stops the reading with its
file and line: a corpus that silently lacks part of what its owner gave would spoil every number that follows.
"""

from __future__ import annotations

import importlib.resources
import io
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from sbp_fast.config import CorpusConfig
from sbp_fast.errors import UserError
from sbp_fast.files import hash_file, hash_value

EMBEDDED = "embedded:"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
EXTRAS = {"s3": "sbp-fast[s3]", "s3a": "sbp-fast[s3]"}
DEFAULT_SOURCE = "text"
UNREADABLE = (OSError, EOFError, pa.ArrowException)  # what storage, decompression and parquet raise on damaged input


@dataclass(frozen=True)
class Document:
    """One raw document; `where` names its file and record for messages."""

    id: str
    text: str
    source: str
    where: str


@dataclass(frozen=True)
class File:
    """One input file: its file system, path there, the path or URL a person knows it by, and its parts below the
    directory that all files of the corpus have in common."""

    system: fsspec.AbstractFileSystem
    path: str
    shown: str
    parts: tuple[str, ...]


def read_documents(config: CorpusConfig, path: str | tuple[str, ...] | None = None) -> Iterator[Document]:
    """Stream the documents of `path` (of `config.path` where not given).

    A record without an id is named after its file and line, "part-0.jsonl:17"; a text file is one document and named
    after itself, "letters:1862.txt". Such a name has no "/" and so no group: a folder is not taken for an original.

    Raises:
        UserError: naming the file, the record and the remedy, for everything that cannot be read or used.
    """
    seen: dict[str, str] = {}
    for file in find_files(config.path if path is None else path):
        found = False
        for document in _read_file(file, config):
            if document.id in seen:
                raise UserError(
                    document.where,
                    f"the id {document.id!r} stands also in {seen[document.id]}",
                    "give every document its own id, or set corpus.id_field to a field that holds one",
                )
            seen[document.id] = document.where
            found = True
            yield document
        if not found:
            raise UserError(file.shown, "holds no documents", "give a file with documents, or leave this one out")


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
        with _user_errors(file.system, file.shown):
            content = (
                hash_file(Path(file.path)) if isinstance(file.system, LocalFileSystem) else str(file.system.ukey(file.path))
            )
        facts.append([list(file.parts), content])
    return hash_value(facts)


def group_of(id: str, separator: str, sources: Collection[str]) -> str:
    """The original that a document is part of: its id up to the last separator.

    An id without one is an original by itself, and so is one whose head merely names its source ("pubmed/3408").
    """
    head, found, _ = id.rpartition(separator) if separator else ("", "", id)
    return head if found and head not in sources else id


def _expand(pattern: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    if pattern.startswith(EMBEDDED):
        pattern = _embedded_file(pattern)
    system, path = _open_system(pattern)
    with _user_errors(system, pattern):
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
    folder = importlib.resources.files("sbp_fast.corpus") / "embedded"
    file = folder / f"{pattern.removeprefix(EMBEDDED)}.jsonl.zst"
    if not file.is_file():
        names = sorted(one.name.removesuffix(".jsonl.zst") for one in folder.iterdir() if one.name.endswith(".jsonl.zst"))
        raise UserError(pattern, "no such embedded corpus", f"the embedded ones are {', '.join(names)}")
    return str(file)


def _open_system(pattern: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return url_to_fs(pattern)
    except ImportError as error:
        protocol = str(split_protocol(pattern)[0])
        remedy = f"pip install '{EXTRAS[protocol]}'" if protocol in EXTRAS else str(error)
        raise UserError(pattern, f"the package that reads {protocol}:// is not installed", remedy) from None
    except ValueError as error:
        raise UserError(pattern, str(error), "give a path or a URL that fsspec knows") from None


@contextmanager
def _user_errors(system: fsspec.AbstractFileSystem, shown: str) -> Iterator[None]:
    # a remote store fails with whatever its client raises: the clients share no base class
    expected = UNREADABLE if isinstance(system, LocalFileSystem) else (Exception,)
    try:
        yield
    except UserError:
        raise
    except expected as error:
        raise UserError(
            shown, f"cannot be read: {error or type(error).__name__}", "check that it is whole, within reach and yours to read"
        ) from error


def _read_file(file: File, config: CorpusConfig) -> Iterator[Document]:
    # `_user_errors` lies around the reading alone: what the consumer raises does not pass through a generator
    with _user_errors(file.system, file.shown):
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


def _read_jsonl(stream: IO[bytes], file: File, config: CorpusConfig) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
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
        yield _document(record, file, number, config)


def _read_parquet(file: File, config: CorpusConfig) -> Iterator[Document]:
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
        number = 0
        for batch in table.iter_batches(1024, columns=[name for name in names if name in wanted]):
            try:
                records = batch.to_pylist()
            except UnicodeDecodeError:
                raise UserError(
                    file.shown, f"text that is not UTF-8 in rows {number + 1} to {number + len(batch)}", "convert it to UTF-8"
                ) from None
            for record in records:
                number += 1
                yield _document(record, file, number, config)


def _document(record: dict[str, Any], file: File, number: int | None, config: CorpusConfig) -> Document:
    record_name = "row" if file.path.endswith(".parquet") else "line"
    where = file.shown if number is None else f"{file.shown}, {record_name} {number}"
    text = record.get(config.text_field)
    if not isinstance(text, str) or not text.strip():
        what = "an empty text" if isinstance(text, str) else "no text" if text is None else "a text that is no string"
        raise UserError(
            where, f"a record with {what} ({config.text_field!r})", "correct or remove it, or set corpus.text_field"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                where, f"half a surrogate pair at character {error.start} is no text", "correct or remove the record"
            ) from None
    name = ":".join(file.parts) if number is None else ":".join([*file.parts, str(number)])
    id, source = record.get(config.id_field), record.get(config.source_field)
    return Document(
        id=name if id is None or id == "" else str(id),
        text=text,
        source=DEFAULT_SOURCE if source is None or source == "" else str(source),
        where=where,
    )


def _decode(line: bytes, shown: str, number: int | None = None) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = number or line.count(b"\n", 0, error.start) + 1
        raise UserError(f"{shown}, line {at}", "not UTF-8 text", "convert the file to UTF-8, as with iconv") from None
