"""Web archives (WARC, ISO 28500), plain or compressed: a record of plain text is a document, as in Common Crawl's WET files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from sbp_fast.data.readers.reader import Fields, InputFile, Reader, Record, decode_utf8, register_reader
from sbp_fast.data.readers.streams import BLOCK_BYTES, compressed, open_stream, read_line, too_large
from sbp_fast.errors import UserError

LINE_BYTES = 1 << 16  # of a header
TEXTS = ("conversion", "resource")
ABOUT_OTHERS = ("warcinfo", "request", "metadata", "revisit")
"""Types of records that describe a crawl or other records, and hold no document."""


class WarcReader(Reader):
    """Reads the plain text of records; their headers, such as `WARC-Target-URI`, are fields, and `WARC-Record-ID` is the id."""

    suffixes = (".warc", ".wet", *compressed(".warc", ".wet"))
    compressed_suffixes = compressed(".warc", ".wet")

    def read(self, file: InputFile, fields: Fields) -> Iterator[Record | UserError]:
        """Yield the texts, and a UserError for each record that holds a page as it was sent, no UTF-8 or too many bytes."""
        with open_stream(file) as stream:
            index = 0
            while headers := _headers(stream, f"{file.shown}, record {index + 1}"):
                index += 1
                where, kind = f"{file.shown}, record {index}", headers.get("WARC-Type", "")
                content = _content(stream, headers, where, fields.record_bytes)
                if kind in ABOUT_OTHERS:
                    continue
                if kind not in TEXTS or not headers.get("Content-Type", "").startswith("text/plain"):
                    problem = f"a record of type {kind or 'unknown'} with {headers.get('Content-Type', 'no Content-Type')}"
                    yield UserError(
                        where, problem, "extract its text first: records of WET files are conversions to text/plain"
                    )
                elif content is None:
                    yield too_large(where, fields.record_bytes)
                else:
                    try:
                        text = decode_utf8(content, where)
                    except UserError as error:
                        yield error
                    else:
                        yield Record({fields.id: headers.get("WARC-Record-ID"), fields.text: text, **headers}, index)


def _headers(stream: IO[bytes], where: str) -> dict[str, str]:
    """Return the headers of the next record; none at the end of the file.

    Raises:
        UserError: no record begins here, or its headers are damaged.
    """
    line = b"\n"
    while line and not line.strip():  # two line ends are between records
        line = _line(stream, where)
    if not line:
        return {}
    if not line.startswith(b"WARC/"):
        raise UserError(where, "does not begin with WARC/ and a version", "give a whole WARC file")
    headers: dict[str, str] = {}
    while (line := _line(stream, where)).strip():
        name, colon, value = decode_utf8(line, where).partition(":")
        if not colon:
            raise UserError(where, f"a header without a colon: {name.strip()!r}", "give a whole WARC file")
        headers[name.strip()] = value.strip()
    return headers


def _line(stream: IO[bytes], where: str) -> bytes:
    line, _ = read_line(stream, LINE_BYTES)
    if line is None:
        raise UserError(where, f"a header of more than {LINE_BYTES} bytes", "give a whole WARC file")
    return line


def _content(stream: IO[bytes], headers: dict[str, str], where: str, limit: int) -> bytes | None:
    """Return the bytes of a record, None in place of more than `limit`, which are passed over.

    Raises:
        UserError: the length is missing, or the file ends before it.
    """
    length = headers.get("Content-Length", "")
    if not (length.isascii() and length.isdigit()):
        raise UserError(where, "has no Content-Length", "give a whole WARC file")
    left, parts = int(length), list[bytes]()
    while left:
        part = stream.read(min(left, BLOCK_BYTES))
        if not part:
            raise UserError(where, "the file ends in the middle of it", "give a whole WARC file")
        left -= len(part)
        if int(length) <= limit:
            parts.append(part)
    return b"".join(parts) if int(length) <= limit else None


register_reader(WarcReader())
