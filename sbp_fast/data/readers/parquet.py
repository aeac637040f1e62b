"""Parquet: a record is a row; a large file is split by row groups."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.data.filesystem import user_errors
from sbp_fast.data.readers.reader import (
    Fields,
    InputFile,
    InputSplit,
    Reader,
    Record,
    lookup,
    missing_column,
    register_reader,
)
from sbp_fast.data.readers.streams import too_large
from sbp_fast.errors import UserError

BATCH_ROWS = 1024
BATCH_BYTES = 16 << 20  # of a row group whose rows are long, by its mean, read at once


class ParquetReader(Reader):
    """Reads the columns of text, id and source; the column of text must be there."""

    suffixes = (".parquet",)
    compressed_suffixes = suffixes
    record_name = "row"

    def read(self, file: InputFile, fields: Fields) -> Iterator[Record | UserError]:
        """Yield the rows, and a UserError for each row whose text is not UTF-8 or too long."""
        with file.open() as stream:
            table = pq.ParquetFile(stream)
            names = {
                name: path for name in (fields.text, fields.id, fields.source) if (path := _find(table.schema_arrow, name))
            }
            if fields.text not in names:
                raise missing_column(file, fields, _leaves(table.schema_arrow))
            number = file.split.offset or 0 if file.split else 0
            groups = range(file.split.start, file.split.stop) if file.split else range(table.num_row_groups)
            for group in groups:
                metadata = table.metadata.row_group(group)
                sizes = _column_bytes(metadata)
                mean = sum(size for path, size in sizes.items() if _is_read(path, names.values())) // max(metadata.num_rows, 1)
                if mean > fields.record_bytes:  # so at least one row is too large, and its page cannot be read in part
                    yield too_large(f"{file.shown}, rows {number + 1} to {number + metadata.num_rows}", fields.record_bytes)
                    number += metadata.num_rows
                    continue
                rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(mean, 1)))
                for batch in table.iter_batches(rows, [group], columns=[*names.values()]):
                    for row in _rows(batch, fields.record_bytes):
                        number += 1
                        where = f"{file.shown}, row {number}"
                        if row is None:
                            yield UserError(where, "not UTF-8 text", "convert it to UTF-8")
                        elif row is TOO_LARGE:
                            yield too_large(where, fields.record_bytes)
                        else:
                            yield Record({name: lookup(row, path) for name, path in names.items()}, number)

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


TOO_LARGE: dict[str, Any] = {}
"""Stands for a row that is too large."""


def _find(schema: pa.Schema, name: str) -> str | None:
    """Return the path of the column that a name means, None where there is none."""
    if name in schema.names or name in _leaves(schema):
        return name
    return None


def _leaves(schema: pa.Schema) -> list[str]:
    """Return the dotted paths of all columns, those inside structs too."""

    def paths(prefix: str, field: pa.Field) -> list[str]:
        path = prefix + field.name
        if not pa.types.is_struct(field.type):
            return [path]
        return [leaf for index in range(field.type.num_fields) for leaf in paths(f"{path}.", field.type.field(index))]

    return [path for field in schema for path in paths("", field)]


def _column_bytes(group: pq.RowGroupMetaData) -> dict[str, int]:
    """Return the bytes of each column of a row group, uncompressed, by its path."""
    columns = [group.column(index) for index in range(group.num_columns)]
    return {column.path_in_schema: column.total_uncompressed_size for column in columns}


def _is_read(path: str, names: Any) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def _rows(batch: pa.RecordBatch, limit: int) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a batch; None for one whose text is not UTF-8, TOO_LARGE for one of more than `limit` bytes."""
    if batch.get_total_buffer_size() > limit:  # a batch of one row may be too large too
        for index in range(len(batch)):
            row = batch.slice(index, 1)
            yield from [TOO_LARGE] if row.nbytes > limit else _decode(row)
        return
    yield from _decode(batch)


def _decode(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [row for index in range(len(batch)) for row in _decode(batch.slice(index, 1))] if len(batch) > 1 else [None]


register_reader(ParquetReader())
