"""Parquet: a record is a row; a large file is split by row groups."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.data.filesystem import user_errors
from sbp_fast.data.readers.reader import Fields, InputFile, InputSplit, Reader, Record, register_reader
from sbp_fast.errors import UserError

BATCH_ROWS = 1024


class ParquetReader(Reader):
    """Reads the columns of text, id and source; the column of text must be there."""

    suffixes = (".parquet",)
    compressed_suffixes = suffixes
    record_name = "row"

    def read(self, file: InputFile, fields: Fields) -> Iterator[Record | UserError]:
        """Yield the rows, and a UserError for each row whose text is not UTF-8."""
        with file.open() as stream:
            table = pq.ParquetFile(stream)
            names = table.schema_arrow.names
            if fields.text not in names:
                raise UserError(
                    file.shown,
                    f"has no column {fields.text!r}",
                    f"set corpus.text_field to the one that holds the text, of {', '.join(names)}",
                )
            columns = [name for name in names if name in (fields.text, fields.id, fields.source)]
            number = file.split.offset or 0 if file.split else 0
            groups = range(file.split.start, file.split.stop) if file.split else None
            for batch in table.iter_batches(BATCH_ROWS, groups, columns=columns):
                for row in _rows(batch):
                    number += 1
                    if row is None:
                        yield UserError(f"{file.shown}, row {number}", "not UTF-8 text", "convert it to UTF-8")
                    else:
                        yield Record(row, number)

    def split(self, file: InputFile, count: int) -> list[InputSplit]:
        """Split by row groups; a damaged file is left whole, and reading it names the damage."""
        try:
            with user_errors(file.system, file.shown), file.open() as stream:
                metadata = pq.ParquetFile(stream).metadata
                rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        except UserError:
            return []
        offsets, count = [0, *accumulate(rows)], min(count, len(rows))
        edges = (len(rows) * index // count for index in range(count + 1))
        return [InputSplit(start, stop, offsets[start]) for start, stop in pairwise(edges)]


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """Return the rows of a batch, None for each one whose text is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [row for index in range(len(batch)) for row in _rows(batch.slice(index, 1))] if len(batch) > 1 else [None]


register_reader(ParquetReader())
