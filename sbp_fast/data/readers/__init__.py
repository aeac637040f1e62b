r"""Formats of raw documents, one reader each, found by file suffix.

Another format is one object; nothing in the package needs to change:

    class TabReader(Reader):
        suffixes = (".tsv",)

        def read(self, file, fields):
            with file.open() as stream:
                for index, values in enumerate(csv.DictReader(io.TextIOWrapper(stream), delimiter="\t"), 1):
                    yield Record(values, index)

    register_reader(TabReader())
"""

from sbp_fast.data.readers import (  # noqa: F401  (each registers its reader)
    csv_rows,
    datatrove,
    json_values,
    jsonl,
    megatron,
    parquet,
    text,
    warc,
)
from sbp_fast.data.readers.reader import (
    READERS,
    Fields,
    InputFile,
    InputSplit,
    Reader,
    Record,
    find_reader,
    lookup,
    register_reader,
)

__all__ = ["READERS", "Fields", "InputFile", "InputSplit", "Reader", "Record", "find_reader", "lookup", "register_reader"]
