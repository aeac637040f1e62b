"""JSON lines, plain or compressed: a record is a line that holds an object; blank lines are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import IO, Any

from sbp_fast.data.filesystem import user_errors
from sbp_fast.data.readers.reader import Fields, InputFile, InputSplit, Reader, Record, decode_utf8, register_reader
from sbp_fast.data.readers.streams import compressed, open_stream, read_line, too_large
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import parse_json

COUNT_BYTES = 1 << 22  # read at once while line ends are counted


class JsonLinesReader(Reader):
    """Reads JSON lines. A plain local file is split at any byte: a split holds the lines that begin in it."""

    suffixes = (".jsonl", *compressed(".jsonl"))
    compressed_suffixes = compressed(".jsonl")
    record_name = "line"

    def read(self, file: InputFile, fields: Fields) -> Iterator[Record | UserError]:
        """Yield the objects, and a UserError for each line that holds none or is too long."""
        with open_stream(file) as stream:
            for number, line in _number_lines(stream, file.split, fields.record_bytes):
                if line is None:
                    yield too_large(f"{file.shown}, line {number}", fields.record_bytes)
                elif not line.isspace():
                    try:
                        yield Record(_parse(line, number, file), number)
                    except UserError as error:
                        yield error

    def split(self, file: InputFile, count: int) -> list[InputSplit]:
        """Split a plain local file by bytes.

        A compressed stream cannot be entered in the middle. The lines of a remote file are not counted, because that
        would read it twice.
        """
        if file.compressed or not file.local:
            return []
        size = file.system.size(file.path)
        edges = (size * index // count for index in range(count + 1))
        return [InputSplit(start, stop) for start, stop in pairwise(edges)]

    def count(self, file: InputFile) -> int:
        """Count the line ends of a split.

        They are counted from the byte before it, where reading it starts, up to the byte where reading the next one starts.
        """
        assert file.split is not None
        start = max(file.split.start - 1, 0)
        left, ends = file.split.stop - 1 - start, 0
        with user_errors(file.system, file.shown), file.open() as stream:
            stream.seek(start)
            while left > 0 and (content := stream.read(min(left, COUNT_BYTES))):
                ends += content.count(b"\n")
                left -= len(content)
        return ends


def _number_lines(stream: IO[bytes], split: InputSplit | None, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines of a file, or those that begin in a split, with their line numbers; None for one beyond `limit` bytes."""
    number, position, stop = 0, 0, float("inf")
    if split is not None:
        number, stop = split.offset or 0, split.stop
        if split.start:
            position = stream.seek(split.start - 1)
            position += read_line(stream, limit)[1]  # the end of a line that begins before the split
            number += 1
    while position < stop:
        line, length = read_line(stream, limit)
        if not length:
            return
        number += 1
        yield number, line
        position += length


def _parse(line: bytes, number: int, file: InputFile) -> dict[str, Any]:
    where = f"{file.shown}, line {number}"
    try:
        record = parse_json(decode_utf8(line, file.shown, number))
    except ValueError as error:
        raise UserError(where, f"malformed JSON: {describe_json_error(error)}", "correct or remove the line") from None
    if not isinstance(record, dict):
        raise not_an_object(where)
    return record


def describe_json_error(error: ValueError) -> str:
    """Return what is wrong with a JSON text, and where in its line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return str(error)


def not_an_object(where: str) -> UserError:
    """Return the error for a record of JSON that is another value than an object."""
    return UserError(where, "not a JSON object", 'write each document as an object such as {"text": "..."}')


register_reader(JsonLinesReader())
