"""Formats of raw documents, one reader each, found by file suffix.

Another format is one object; nothing in the package needs to change:

    class Csv(Reader):
        suffixes = (".csv",)

        def read(self, file, fields):
            with file.open() as stream:
                for index, values in enumerate(csv.DictReader(io.TextIOWrapper(stream)), 1):
                    yield Record(values, index)

    register_reader(Csv())
"""

from sbp_fast.data.readers import jsonl, parquet, text  # noqa: F401  (each registers its reader)
from sbp_fast.data.readers.reader import (
    READERS,
    Fields,
    InputFile,
    InputSplit,
    Reader,
    Record,
    find_reader,
    register_reader,
)

__all__ = ["READERS", "Fields", "InputFile", "InputSplit", "Reader", "Record", "find_reader", "register_reader"]
