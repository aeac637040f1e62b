"""The interface of a reader of raw documents, and the registry of readers by file suffix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from sbp_fast.data.filesystem import user_errors
from sbp_fast.errors import UserError
from sbp_fast.registry import Registry


@dataclass(frozen=True)
class Fields:
    """How records are read.

    Attributes:
        text, id, source: keys (columns) that hold the text, the id and the source; "doc.text" is the key `text` of the object
            (struct) under `doc`, unless there is a key of that very name.
        record_bytes: a record of more bytes is refused before the rest of it is read.
        tokenizer: path of the `tokenizer.json` that files of tokens are decoded with; "train" where there is none.
        lossy: whether documents of tokens are accepted whose text has other tokens.
    """

    text: str
    id: str
    source: str
    record_bytes: int = 256 << 20
    tokenizer: str = "train"
    lossy: bool = False


@dataclass(frozen=True)
class Record:
    """One record of a file, before its fields are checked.

    Attributes:
        values: field name -> value; the reader may leave out fields that nobody asked for.
        index: position of the record in its whole file, from 1: a line or row number. None where a file is one record.
        recoded: whether the file holds other tokens than those of the text.
    """

    values: Mapping[str, Any]
    index: int | None = None
    recoded: bool = False


@dataclass(frozen=True)
class InputSplit:
    """A part of a file that one task reads, half-open: [start, stop).

    Attributes:
        start, stop: in units of the reader: bytes of JSON lines, row groups of parquet, documents of tokens.
        offset: what the reader must know of the file before the split to number its records: rows of parquet, line ends of
            JSON lines, documents of tokens. None until `Reader.count` has counted the splits before it.
    """

    start: int
    stop: int
    offset: int | None = None


@dataclass(frozen=True)
class InputFile:
    """One input file, or a split of one.

    Attributes:
        system: the file system that holds it.
        path: the path there.
        shown: the path or URL to name it by in messages.
        parts: components of its path below the directory that all files of the corpus share.
        reader: the reader of its format. It travels with the file, so that a worker process need not have it registered.
        split: the part to read; None for the whole file.
        named: whether the user named this very file, not a folder or glob that it is among.
    """

    system: fsspec.AbstractFileSystem
    path: str
    shown: str
    parts: tuple[str, ...]
    reader: Reader
    split: InputSplit | None = None
    named: bool = False

    @property
    def compressed(self) -> bool:
        """Whether its content is compressed."""
        return self.path.lower().endswith(self.reader.compressed_suffixes)

    @property
    def local(self) -> bool:
        """Whether the file lies on this machine."""
        return isinstance(self.system, LocalFileSystem)

    def companions(self) -> list[str]:
        """Return the paths of the files that belong to this one and are there.

        Raises:
            UserError: the store does not answer.
        """
        with user_errors(self.system, self.shown):
            return [path for path in self.reader.companions(self.path) if self.system.isfile(path)]

    def stored_bytes(self) -> int | None:
        """Return the size of the whole file and of those that belong to it; None where a store does not tell.

        Raises:
            UserError: the store does not answer.
        """
        companions = self.companions()
        with user_errors(self.system, self.shown):
            sizes = [self.system.size(path) for path in (self.path, *companions)]
        return None if None in sizes else sum(sizes)

    def open(self) -> IO[bytes]:
        """Open the file for binary reading."""
        return self.system.open(self.path, "rb")


class Reader(ABC):
    """Reads the files of one format into records.

    Attributes:
        suffixes: the file suffixes that it reads, each with its dot.
        compressed_suffixes: those of them whose files are compressed, for estimates of the size of the text.
        record_name: what a record is called in messages: "line" for "part-0.jsonl, line 17".
        whole_files: whether a file is one record. Folders have such files beside their documents, licences for one: they are
            left out where there are files of records.
    """

    suffixes: tuple[str, ...]
    compressed_suffixes: tuple[str, ...] = ()
    record_name = "record"
    whole_files = False

    @abstractmethod
    def read(self, file: InputFile, fields: Fields) -> Iterator[Record | UserError]:
        """Stream the records of a file or split, in order.

        Yields:
            Records, and a UserError in place of each one that cannot be read.

        Raises:
            UserError: nothing more of the file can be read.
        """

    def companions(self, path: str) -> tuple[str, ...]:
        """Return the paths of the files that belong to a file, whether they are there or not, such as an index beside it."""
        return ()

    def split(self, file: InputFile, count: int) -> list[InputSplit]:
        """Split a large file into about `count` parts for parallel tasks; an empty list reads it whole.

        The splits must be a function of the file alone, in order, and cover it.
        """
        return []

    def count(self, file: InputFile) -> int:
        """Return what a split adds to the `offset` of the next one; called where `split` left the offset open."""
        raise NotImplementedError(f"{type(self).__name__} leaves the offset of a split open and cannot count")


READERS: Registry[Reader] = Registry("reader of files with suffix")


def register_reader(reader: Reader) -> Reader:
    """Register a reader under each of its suffixes and return it.

    Raises:
        ValueError: a suffix has a reader already.
    """
    for suffix in reader.suffixes:
        READERS.register(suffix, reader)
    return reader


def find_reader(path: str) -> Reader | None:
    """Return the reader of the longest registered suffix that a path ends with, in any case; None where there is none."""
    matching = [suffix for suffix in READERS if path.lower().endswith(suffix)]
    return READERS[max(matching, key=len)] if matching else None


def lookup(values: Mapping[str, Any], key: str) -> Any:
    """Return the value under a key of a record, or under a dotted path of keys; None where there is none."""
    if key in values:
        return values[key]
    value: Any = values
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def missing_column(file: InputFile, fields: Fields, names: Sequence[str]) -> UserError:
    """Return the error for a table without the column of text."""
    remedy = f"set corpus.text_field to the one that holds the text, of {', '.join(names)}"
    return UserError(file.shown, f"has no column {fields.text!r}", remedy)


def decode_utf8(content: bytes, shown: str, line: int | None = None) -> str:
    """Decode UTF-8 text, without its byte order mark.

    Args:
        content: the bytes of one line, or of a whole file.
        shown: the file's name for messages.
        line: the line number; None for the bytes of a whole file.

    Raises:
        UserError: naming the line that is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = line or content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{shown}, line {number}", "not UTF-8 text", "convert the file to UTF-8, as with iconv") from None
