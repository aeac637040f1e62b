"""JSON files, plain or compressed: an array of objects, objects one after another, or JSON lines under another suffix."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from sbp_fast.data.readers.jsonl import JsonLinesReader, describe_json_error, not_an_object
from sbp_fast.data.readers.reader import Fields, InputFile, Reader, Record, register_reader
from sbp_fast.data.readers.streams import compressed, open_stream, too_large
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import DECODER

HEAD_BYTES = 1 << 12  # that tell the form of a file
CHUNK_BYTES = 1 << 18
ARRAY_OR_INDENTED = re.compile(rb"\s*(\[|\{\s*\n)")
SPACE = re.compile(r"\s*")
TAIL = 16  # characters at the end of a text in which an error may come from its being cut there


class JsonReader(Reader):
    """Reads the objects of a JSON file as records, one at a time; a file of JSON lines line by line."""

    suffixes = (".json", *compressed(".json"))
    compressed_suffixes = compressed(".json")

    def read(self, file: InputFile, fields: Fields) -> Iterator[Record | UserError]:
        """Yield the objects, and a UserError for each other value.

        Raises:
            UserError: malformed JSON in an array, behind which no record can be told, or a record that is too large.
        """
        with open_stream(file) as stream:
            head = stream.read(HEAD_BYTES).removeprefix(codecs.BOM_UTF8)
        if not ARRAY_OR_INDENTED.match(head):
            yield from JsonLinesReader().read(file, fields)
            return
        with open_stream(file) as stream:
            for number, value in enumerate(_values(stream, file, fields.record_bytes), 1):
                if isinstance(value, dict):
                    yield Record(value, number)
                else:
                    yield not_an_object(f"{file.shown}, record {number}")


class _Text:
    """The text of a stream, of which what is parsed is forgotten."""

    def __init__(self, stream: IO[bytes], file: InputFile) -> None:
        self._stream, self._file = stream, file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position, self.ended = "", 0, False

    def next_character(self) -> str:
        """Return the character at the position, behind white space; "" at the end."""
        while True:
            self.position = SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.read_more()

    def read_more(self) -> None:
        """Read as much again as is not parsed yet, so that a long record is not parsed often."""
        content = self._stream.read(max(CHUNK_BYTES, len(self.text) - self.position))
        self.ended = not content
        try:
            self.text = self.text[self.position :] + self._decoder.decode(content, final=self.ended)
        except UnicodeDecodeError:
            raise UserError(self._file.shown, "not UTF-8 text", "convert the file to UTF-8, as with iconv") from None
        self.position = 0


def _values(stream: IO[bytes], file: InputFile, limit: int) -> Iterator[Any]:
    """Yield the elements of an array, or the values that follow each other."""
    text, number = _Text(stream, file), 1
    array = text.next_character() == "["
    text.position += array
    while (character := text.next_character()) and not (array and character == "]"):
        if array and number > 1:
            if character != ",":
                raise _malformed(file, number, "no comma before it")
            text.position += 1
            text.next_character()
        yield _value(text, file, number, limit)
        number += 1
    if array and character != "]":
        raise _malformed(file, number, "the array does not end")
    text.position += array
    if text.next_character():
        raise _malformed(file, number, "text after the end of the array")


def _value(text: _Text, file: InputFile, number: int, limit: int) -> Any:
    while True:
        try:
            value, end = DECODER.raw_decode(text.text, text.position)
            if end < len(text.text) or text.ended:
                text.position = end
                return value
        except ValueError as error:
            cut = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated string") or error.pos >= len(text.text) - TAIL
            )
            if text.ended or not cut:
                raise _malformed(file, number, describe_json_error(error)) from None
        except RecursionError:
            raise _malformed(file, number, "nested too deeply") from None
        if len(text.text) - text.position > limit:
            raise too_large(f"{file.shown}, record {number}", limit)
        text.read_more()


def _malformed(file: InputFile, number: int, reason: str) -> UserError:
    return UserError(f"{file.shown}, record {number}", f"malformed JSON: {reason}", "correct the file")


register_reader(JsonReader())
