"""CSV, plain or compressed: the first row names the columns, and every other row is a record."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO

from sbp_fast.data.readers.reader import Fields, InputFile, Reader, Record, missing_column, register_reader
from sbp_fast.data.readers.streams import compressed, open_stream, read_line, too_large
from sbp_fast.errors import UserError


class CsvReader(Reader):
    """Reads comma-separated rows, in which quotes enclose fields with commas and line ends (RFC 4180)."""

    suffixes = (".csv", *compressed(".csv"))
    compressed_suffixes = compressed(".csv")
    record_name = "row"

    def read(self, file: InputFile, fields: Fields) -> Iterator[Record | UserError]:
        """Yield the rows, numbered without the header, and a UserError for each that does not fit the header.

        Raises:
            UserError: no column of text, a quoted field that does not end, or a record that is too large.
        """
        csv.field_size_limit(max(csv.field_size_limit(), fields.record_bytes))  # what bounds a row is `_Lines`
        with open_stream(file) as stream:
            lines = _Lines(stream, file, fields.record_bytes)
            rows = csv.reader(lines, strict=True)
            try:
                header = next(rows, None)
                if header is None:
                    return
                if fields.text not in header:
                    raise missing_column(file, fields, header)
                for row in rows:
                    if row:
                        lines.next_row()
                        yield _make_record(row, header, file, lines.row)
            except csv.Error as error:
                raise UserError(f"{file.shown}, row {lines.row + 1}", f"malformed CSV: {error}", "correct the file") from None


class _Lines:
    """The lines of a CSV file as text; bytes that are not UTF-8 become lone surrogates, by which their row is found.

    Attributes:
        row: number of the row that was read last, without the header.
    """

    def __init__(self, stream: IO[bytes], file: InputFile, limit: int) -> None:
        self._stream, self._file, self._limit = stream, file, limit
        self._row_bytes, self._first, self.row = 0, True, 0

    def next_row(self) -> None:
        """Count a row."""
        self.row += 1
        self._row_bytes = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line, length = read_line(self._stream, self._limit)
        self._row_bytes += length
        if line is None or self._row_bytes > self._limit:
            raise too_large(f"{self._file.shown}, row {self.row + 1}", self._limit)
        if not line:
            raise StopIteration
        encoding, self._first = "utf-8-sig" if self._first else "utf-8", False
        return line.decode(encoding, "surrogateescape")


def _make_record(row: list[str], header: list[str], file: InputFile, number: int) -> Record | UserError:
    where = f"{file.shown}, row {number}"
    if len(row) != len(header):
        return UserError(where, f"{len(row)} fields under a header of {len(header)}", "correct or remove the row")
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return UserError(where, "not UTF-8 text", "convert the file to UTF-8, as with iconv")
    return Record(dict(zip(header, row, strict=True)), number)


register_reader(CsvReader())
