"""What was made elsewhere for the documents of a prepared corpus: records that name them by their ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sbp_fast.data.documents import is_name
from sbp_fast.data.filesystem import user_errors
from sbp_fast.data.input_files import find_files
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.readers import Fields, InputFile, Record
from sbp_fast.errors import TransientError, UserError


class NamedDocument(NamedTuple):
    """A unique or a held-out document, and its index among those of its kind."""

    heldout: bool
    row: int


class DocumentIds:
    """The unique and the held-out documents of a prepared corpus, found by their ids."""

    def __init__(self, prepared: PreparedCorpus) -> None:
        kinds = ((False, prepared.unique), (True, prepared.heldout))
        self._indices = {heldout: {str(id): index for index, id in enumerate(corpus.ids)} for heldout, corpus in kinds}

    def find(self, id: str, where: str) -> NamedDocument | None:
        """Return the document of an id; None where no unique and no held-out document has it.

        Args:
            id: of a document.
            where: file and record that name it, for messages.

        Raises:
            UserError: a unique and a held-out document have the id; `prepare` refuses two documents of one kind that share one.
        """
        documents = [NamedDocument(heldout, indices[id]) for heldout, indices in self._indices.items() if id in indices]
        if len(documents) > 1:
            problem = f"a unique and a held-out document have the id {id!r}"
            raise UserError(where, problem, "give every document its own id")
        return documents[0] if documents else None


def read_records(path: str | tuple[str, ...], fields: Fields, remedy: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the records of files, each with its file and record for messages.

    Args:
        path: files, globs, folders or URLs, of suffixes that have a reader.
        fields: columns to read; that of the text must be there.
        remedy: what the files must hold, for messages.

    Raises:
        UserError: a file or a record that cannot be read.
    """
    for file in find_files(path):
        for record in _read(file, fields, remedy):
            if isinstance(record, UserError):
                raise UserError(record.where, record.what, remedy)
            yield f"{file.shown}, {file.reader.record_name} {record.index}", record.values


def _read(file: InputFile, fields: Fields, remedy: str) -> Iterator[Record | UserError]:
    try:
        with user_errors(file.system, file.shown):
            yield from file.reader.read(file, fields)
    except TransientError:
        raise
    except UserError as error:  # whose remedy is about documents
        raise UserError(error.where, error.what, remedy) from None


def read_id(values: Mapping[str, Any], field: str, where: str, missing: str, remedy: str) -> str:
    """Return the id of a document under a field of a record.

    Args:
        values: of the record.
        field: that holds the id: text or an integer.
        where: file and record, for messages.
        missing: what the record is if the field is missing or empty, for the message.
        remedy: what the file must hold.

    Raises:
        UserError: no id there, or one that is neither text nor an integer.
    """
    id = values.get(field)
    if id in (None, ""):
        raise UserError(where, missing, remedy)
    if not is_name(id):
        raise UserError(where, f"its {field} is neither text nor an integer", remedy)
    return str(id)
