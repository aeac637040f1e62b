"""JSON lines, plain or compressed: a record is a line that holds an object; blank lines are skipped."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import IO, Any

import pyarrow as pa

from sbp_fast.data.filesystem import user_errors
from sbp_fast.data.readers.reader import Fields, InputFile, InputSplit, Reader, Record, decode_utf8, register_reader
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import parse_json

CODECS = {".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
BUFFER_BYTES = 1 << 20
COUNT_BYTES = 1 << 22  # read at once while line ends are counted


class JsonLinesReader(Reader):
    """Reads JSON lines. A plain local file is split at any byte: a split holds the lines that begin in it."""

    suffixes = (".jsonl", *CODECS)
    compressed_suffixes = tuple(CODECS)
    record_name = "line"

    def read(self, file: InputFile, fields: Fields) -> Iterator[Record | UserError]:
        """Yield the objects, and a UserError for each line that holds none."""
        with file.open() as raw, _decompress(raw, file.path) as stream:
            for number, line in _number_lines(stream, file.split):
                if line.isspace():
                    continue
                try:
                    yield Record(_parse(line, number, file), number)
                except UserError as error:
                    yield error

    def split(self, file: InputFile, count: int) -> list[InputSplit]:
        """Split a plain local file by bytes.

        A compressed stream cannot be entered in the middle. The lines of a remote file are not counted, because that
        would read it twice.
        """
        if file.path.endswith(self.compressed_suffixes) or not file.local:
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


def _decompress(raw: IO[bytes], path: str) -> IO[bytes]:
    # pyarrow and not fsspec, which takes a truncated .zst for a whole one
    for suffix, codec in CODECS.items():
        if path.endswith(suffix):
            return io.BufferedReader(pa.CompressedInputStream(raw, codec), BUFFER_BYTES)
    return raw


def _number_lines(stream: IO[bytes], split: InputSplit | None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, or those that begin in a split, with their line numbers in the file."""
    if split is None:
        yield from enumerate(stream, 1)
        return
    number, position = split.offset or 0, 0
    if split.start:
        position = stream.seek(split.start - 1)
        position += len(stream.readline())  # the end of a line that begins before the split
        number += 1
    while position < split.stop and (line := stream.readline()):
        number += 1
        yield number, line
        position += len(line)


def _parse(line: bytes, number: int, file: InputFile) -> dict[str, Any]:
    where = f"{file.shown}, line {number}"
    try:
        record = parse_json(decode_utf8(line, file.shown, number))
    except ValueError as error:
        reason = (
            f"{error.msg.removesuffix(' at')} at column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        raise UserError(where, f"malformed JSON: {reason}", "correct or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(where, "not a JSON object", 'write each document as an object such as {"text": "..."}')
    return record


register_reader(JsonLinesReader())
