"""Text files: the whole file is one record."""

from __future__ import annotations

from collections.abc import Iterator

from sbp_fast.data.readers.reader import Fields, InputFile, Reader, Record, decode_utf8, register_reader


class TextReader(Reader):
    """Reads a UTF-8 text file as one record without an id."""

    suffixes = (".txt",)

    def read(self, file: InputFile, fields: Fields) -> Iterator[Record]:
        """Yield the content of the file."""
        with file.open() as stream:
            text = decode_utf8(stream.read(), file.shown)
        yield Record({fields.text: text})


register_reader(TextReader())
