"""Raw documents, file by file, local or behind an fsspec URL; `sbp_fast.data.readers` has the formats.

A record that cannot be used is returned in its place as a UserError that names its file and line: a corpus that silently lacked
some of its documents would spoil every number that follows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from sbp_fast.config import CorpusConfig
from sbp_fast.data.filesystem import user_errors
from sbp_fast.data.input_files import EMBEDDED
from sbp_fast.data.readers import Fields, InputFile, Record, lookup
from sbp_fast.errors import UserError

DEFAULT_SOURCE = "text"
PASSAGE_MARK = "#"
PASSAGE = re.compile(rf"{PASSAGE_MARK}\d{{4,}}$")


@dataclass(frozen=True)
class Document:
    """One raw document; `where` names its file and record for messages, `recoded` is that of its record."""

    id: str
    text: str
    source: str
    where: str
    recoded: bool = False


def read_file(file: InputFile, config: CorpusConfig) -> Iterator[Document | UserError]:
    """Stream the documents of one file or split, in order.

    A record without an id is named after its file and line, "part-0.jsonl:17"; a text file is one document, named after
    itself, "letters:1862.txt". Such a name has no "/", so that no folder is taken for an original that documents share.

    Yields:
        Documents, and a UserError in place of each record that cannot be used; last, if the file is damaged, or holds nothing
        though the user named it, one that says so.
    """
    fields = Fields(
        config.text_field,
        config.id_field,
        config.source_field,
        config.maximum_record_mib << 20,
        config.tokenizer,
        config.lossy_tokenizer,
    )
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
    if empty and file.named and file.split is None:
        yield UserError(file.shown, "holds no documents", "give a file with documents, or leave this one out")


def is_embedded(corpus: CorpusConfig) -> bool:
    """Return whether the documents are the ones that come with the package."""
    return isinstance(corpus.path, str) and corpus.path.startswith(EMBEDDED)


def heldout_path(corpus: CorpusConfig) -> str | tuple[str, ...] | None:
    """Return where the held-out documents are read from; None if a part of the others is to be held out."""
    if corpus.heldout != "auto":
        return corpus.heldout
    return f"{corpus.path}_heldout" if is_embedded(corpus) else None


def resolve_separator(corpus: CorpusConfig) -> str:
    """Return the separator of ids by which documents are parts of originals, "" for none.

    The ids of the embedded corpus name originals; those of another corpus may be URLs, so that it has to ask for grouping.
    """
    if corpus.group_separator != "auto":
        return corpus.group_separator
    return "/" if is_embedded(corpus) else ""


def passage_id(id: str, index: int, separator: str) -> str:
    """Return the id of a passage of a document."""
    return f"{id}{separator or PASSAGE_MARK}{index:04d}"


def group_of(id: str, separator: str, sources: Collection[str]) -> str:
    """Return the original that a document is part of: its id up to the last separator.

    A document whose id has no separator is an original by itself, and so is one whose id merely begins with the name of its
    source ("pubmed/3408"). Without a separator only the passages of a document are parts of one original.
    """
    if not separator:
        return PASSAGE.sub("", id)
    head = head_of(id, separator)
    return id if head in sources else head


def head_of(id: str, separator: str) -> str:
    """Return an id up to its last separator, the whole id where there is none."""
    head, separated, _ = id.rpartition(separator) if separator else ("", "", id)
    return head if separated else id


def _make_document(record: Record, file: InputFile, fields: Fields) -> Document | UserError:
    where = file.shown if record.index is None else f"{file.shown}, {file.reader.record_name} {record.index}"
    text = lookup(record.values, fields.text)
    if not isinstance(text, str) or not text.strip():
        problem = "an empty text" if isinstance(text, str) else "no text" if text is None else "a text that is no string"
        remedy = "correct or remove it, or set corpus.text_field"
        return UserError(where, f"a record with {problem} ({fields.text!r})", remedy)
    name = ":".join(file.parts) if record.index is None else ":".join([*file.parts, str(record.index)])
    id, source = lookup(record.values, fields.id), lookup(record.values, fields.source)
    for value, kind, field in ((id, "id", fields.id), (source, "source", fields.source)):
        if not is_name(value):
            problem = f"its {kind} ({field!r}) is of type {type(value).__name__}, neither text nor an integer"
            return UserError(where, problem, f"convert it, or set corpus.{kind}_field to another field")
    id = name if id is None or id == "" else str(id)
    source = DEFAULT_SOURCE if source is None or source == "" else str(source)
    for value, kind in ((text, "text"), (id, "id"), (source, "source")):
        position = _lone_surrogate(value)
        if position is not None:
            problem = f"half a surrogate pair at character {position} of its {kind} stands for nothing"
            return UserError(where, problem, "correct or remove the record")
    return Document(id, text, source, where, record.recoded)


def is_name(value: Any) -> bool:
    """Return whether a value can name a document or a source: text, an integer, or nothing."""
    return value is None or (isinstance(value, str | int) and not isinstance(value, bool))


def _lone_surrogate(value: str) -> int | None:
    """Return the position of a character that UTF-8 cannot encode, if there is one."""
    if value.isascii():
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
