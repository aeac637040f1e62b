"""Text files, plain or compressed: the whole file is one record."""

from __future__ import annotations

from collections.abc import Iterator

from sbp_fast.data.readers.reader import Fields, InputFile, Reader, Record, decode_utf8, register_reader
from sbp_fast.data.readers.streams import compressed, open_stream, too_large


class TextReader(Reader):
    """Reads a UTF-8 text file as one record without an id."""

    suffixes = (".txt", *compressed(".txt"))
    compressed_suffixes = compressed(".txt")
    whole_files = True

    def read(self, file: InputFile, fields: Fields) -> Iterator[Record]:
        """Yield the content of the file."""
        with open_stream(file) as stream:
            content = stream.read(fields.record_bytes + 1)
        if len(content) > fields.record_bytes:
            raise too_large(file.shown, fields.record_bytes)
        yield Record({fields.text: decode_utf8(content, file.shown)})


register_reader(TextReader())
