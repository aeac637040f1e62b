"""The shuffle of `prepare`: documents are read once and written to disk so that any range of the order can be read alone.

A document's position in the shuffled order is a hash of its text under the run's seed, so that exact duplicates lie side by
side; where these all stay, it is a hash of id and text. Documents that are named unique stand before all others. The order is
divided into buckets. Shuffle-write: what is read goes to chunks, Arrow files with one record batch a bucket, each written by
one process in bounded memory. Shuffle-read: a partition of the order is its bucket's batch of every chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from sbp_fast.config import CorpusConfig
from sbp_fast.data.documents import Document, head_of, passage_id, read_file, resolve_separator
from sbp_fast.data.passages import split_passages
from sbp_fast.data.readers import InputFile
from sbp_fast.errors import TransientError, UserError
from sbp_fast.pipeline.files import atomic_open, dump_json, parse_json
from sbp_fast.pipeline.seals import is_sealed, read_marker, remove_sealed, seal, write_marker

DOCUMENT_BYTES = 256  # that a document takes in memory beside its text
KEY_BITS = 64
INDEX_BITS = 40  # of a document's index in its group of files; the other bits are the index of the group
SCHEMA = pa.schema(
    {
        "key": pa.uint64(),  # position in the shuffled order: see `position`; else the high half of the text's hash
        "key_low": pa.uint64(),  # the low half, which tells apart texts of equal position
        "index": pa.uint64(),  # position in the order of reading
        "id_hash": pa.uint64(),  # of the record's id
        "head_hash": pa.uint64(),  # of that id up to its last separator
        "passage": pa.int32(),  # index of the passage in its record, -1 where the record is whole
        "heldout": pa.bool_(),  # whether the document was given to be held out
        "id": pa.string(),
        "source": pa.string(),
        "text": pa.large_string(),
    }
)


@dataclass(frozen=True)
class ShuffleWriteTask:
    """What one process needs to read a group of files and write their documents to chunks.

    Attributes:
        directory: where the chunks go.
        files: one file or split, or several small files, in the order of reading.
        index: of the group in the order of reading.
        heldout: whether its documents are given to be held out.
        unique: whether its documents are named unique; None where none are.
        buckets: of the shuffled order.
        chunk_bytes: the document that brings a chunk to this closes it; DOCUMENT_BYTES are counted for each.
        limit: documents to read at most; None for all.
    """

    directory: Path
    files: tuple[InputFile, ...]
    index: int
    heldout: bool
    unique: bool | None
    config: CorpusConfig
    seed: int
    buckets: int
    chunk_bytes: int
    limit: int | None = None


@dataclass(frozen=True)
class ShufflePartition:
    """A range of the shuffled order: the documents of `bucket` whose key is in [low, high)."""

    bucket: int
    low: int
    high: int


def hash_name(name: str, seed: int) -> int:
    """Return 64 bits that stand for the name of a document or an original."""
    return xxhash.xxh3_64_intdigest(name.encode(), seed)


def position(digest: int, unique: bool | None) -> tuple[int, int]:
    """Return the halves of a 128-bit hash, of which the high one is made the position of a document.

    Where documents are named unique, their positions are in the first half of the order, and those of the others in the second.
    """
    high, low = digest >> KEY_BITS, digest & (1 << KEY_BITS) - 1
    return (high if unique is None else high >> 1 | (not unique) << KEY_BITS - 1), low


def in_first_half(keys: np.ndarray) -> np.ndarray:
    """Return which positions, uint64 [documents], are in the first half of the order. bool [documents]."""
    return keys < np.uint64(1 << KEY_BITS - 1)


def bucket_starts(buckets: int) -> list[int]:
    """Return the key at which each bucket starts, and the end of the last bucket."""
    return [-(-(bucket << KEY_BITS) // buckets) for bucket in range(buckets + 1)]


def plan_partitions(bucket_bytes: Mapping[str, int], buckets: int, partition_bytes: int) -> list[ShufflePartition]:
    """Divide the shuffled order into partitions of about `partition_bytes` at most: buckets, or parts of those that are larger.

    Args:
        bucket_bytes: the bytes in each bucket, by its index as a string.
        buckets: their number.
        partition_bytes: the size aimed at.
    """
    starts, partitions = bucket_starts(buckets), []
    for bucket in range(buckets):
        count = max(1, -(-bucket_bytes.get(str(bucket), 0) // partition_bytes))
        width = starts[bucket + 1] - starts[bucket]
        edges = [starts[bucket] + width * index // count for index in range(count + 1)]
        partitions += [ShufflePartition(bucket, low, high) for low, high in pairwise(edges)]
    return partitions


def shuffle_write(task: ShuffleWriteTask) -> dict[str, Any]:
    """Read a group of files and write their documents to chunks; chunks that an earlier attempt finished are kept.

    Returns:
        "documents" read, those of them that are "recoded", "other_sources" left out, "passages" made, "skipped" records; under
        "source" the documents of each source, under "bucket" the bytes of each bucket, DOCUMENT_BYTES counted for a document,
        under "read" the records of each file by its number in the group.

    Raises:
        UserError: the first record that cannot be used, unless `on_error` is "skip"; a store that fails, always.
    """
    finished = task.directory / f"group-{task.index:06d}.json"
    counts = read_marker(finished)
    if counts is not None:
        return _nest_counts(counts)
    writer = _ChunkWriter(task)
    writer.accept_chunks()
    every = ((number, item) for number, file in enumerate(task.files) for item in read_file(file, task.config))
    items = islice(every, writer.total["items"], None)
    limit = task.limit if task.limit is not None else float("inf")
    while writer.total["documents"] + writer.counts["documents"] < limit and (item := next(items, None)) is not None:
        writer.add(*item)
    writer.close_chunk()
    write_marker(finished, writer.chunks, **writer.total)
    return _nest_counts(writer.total)


def _nest_counts(total: Mapping[str, int]) -> dict[str, Any]:
    """Turn counts with keys such as "bucket:3" and "source:news" into dictionaries of their own."""
    nested: dict[str, Any] = {
        key: total.get(key, 0) for key in ("documents", "recoded", "other_sources", "passages", "skipped")
    }
    for kind in ("source", "bucket", "read"):
        nested[kind] = {key.partition(":")[2]: value for key, value in total.items() if key.startswith(f"{kind}:")}
    return nested


class _ChunkWriter:
    """Collects rows and writes one chunk after another.

    Attributes:
        chunks: paths of the finished ones.
        total: counts of the finished chunks.
        counts: of the chunk that is being filled.
    """

    def __init__(self, task: ShuffleWriteTask) -> None:
        self.task, self.total = task, Counter[str]()
        self.chunks: list[Path] = []
        self._clear()

    def accept_chunks(self) -> None:
        """Accept the chunks that an earlier attempt sealed, up to the first that is damaged; it and later ones are removed."""
        paths = sorted(self.task.directory.glob(f"chunk-{self.task.index:06d}-*.arrow"))
        self.chunks = list(takewhile(is_sealed, paths))
        for path in self.chunks:
            self.total.update(_read_counts(path))
        for path in paths[len(self.chunks) :]:
            remove_sealed(path)

    def _clear(self) -> None:
        self.rows: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        self.skipped: list[dict[str, str]] = []
        self.counts: Counter[str] = Counter()
        self.bytes = 0

    def add(self, number: int, item: Document | UserError) -> None:
        """Add a record of the file with a number in the group."""
        self.counts.update(("items", f"read:{number}"))
        self.bytes += DOCUMENT_BYTES
        if isinstance(item, UserError):
            self._skip(item, self.task.files[number])
        else:
            self._add_document(item)
        if self.bytes >= self.task.chunk_bytes:
            self.close_chunk()
            seal(self.chunks[-1])

    def _skip(self, error: UserError, file: InputFile) -> None:
        if self.task.config.on_error == "stop" or isinstance(error, TransientError):
            raise error
        where = error.where.replace(file.shown, "/".join(file.parts), 1)  # the same wherever the files lie
        self.skipped.append({"where": where, "what": error.what})
        self.counts["skipped"] += 1

    def _add_document(self, document: Document) -> None:
        config, seed = self.task.config, self.task.seed
        if config.sources and document.source not in config.sources:
            self.counts["other_sources"] += 1
            return
        separator, limit = resolve_separator(config), config.passage_characters
        common = {
            "id_hash": hash_name(document.id, seed),
            "head_hash": hash_name(head_of(document.id, separator), seed),
            "heldout": self.task.heldout,
            "source": document.source,
        }
        self.counts.update({"documents": 1, "recoded": int(document.recoded), f"source:{document.source}": 1})
        if not limit or len(document.text) <= limit:
            self._add_row(document.id, document.text, -1, common)
            return
        for index, passage in enumerate(split_passages(document.text, limit)):
            self._add_row(passage_id(document.id, index, separator), passage, index, common)
            self.counts["passages"] += 1

    def _add_row(self, id: str, text: str, passage: int, common: dict[str, Any]) -> None:
        content = text.encode()
        hashed = id.encode() + b"\0" + content if self.task.config.deduplicate == "none" else content
        key, key_low = position(xxhash.xxh3_128_intdigest(hashed, self.task.seed), self.task.unique)
        self.counts["rows"] += 1
        index = self.task.index << INDEX_BITS | self.total["rows"] + self.counts["rows"]
        row = {**common, "key": key, "key_low": key_low, "index": index, "passage": passage, "id": id, "text": text}
        for name, value in row.items():
            self.rows[name].append(value)
        size = len(content) + DOCUMENT_BYTES
        self.bytes += size
        self.counts[f"bucket:{key * self.task.buckets >> KEY_BITS}"] += size

    def close_chunk(self) -> None:
        if not self.counts["items"]:
            return
        path = self.task.directory / f"chunk-{self.task.index:06d}-{len(self.chunks):06d}.arrow"
        table = pa.table(self.rows, SCHEMA)
        keys = table["key"].to_numpy()
        order = np.argsort(keys, kind="stable")
        bounds = np.searchsorted(keys[order], np.array(bucket_starts(self.task.buckets)[:-1], np.uint64)).tolist()
        metadata = {"counts": dump_json(self.counts, path), "skipped": dump_json(self.skipped, path)}
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with atomic_open(path) as file, pa.ipc.new_file(file, SCHEMA.with_metadata(metadata), options=options) as writer:
            for start, stop in zip(bounds, [*bounds[1:], len(order)], strict=True):
                writer.write_batch(_as_batch(table.take(order[start:stop])))
        self.chunks.append(path)
        self.total.update(self.counts)
        self._clear()


def _as_batch(table: pa.Table) -> pa.RecordBatch:
    columns = [column.combine_chunks() for column in table.columns]
    return pa.RecordBatch.from_arrays(
        [column.chunk(0) if isinstance(column, pa.ChunkedArray) else column for column in columns], schema=SCHEMA
    )


def _read_counts(path: Path) -> dict[str, int]:
    with pa.memory_map(str(path)) as source:
        return parse_json(pa.ipc.open_file(source).schema.metadata[b"counts"])


class ShuffleReader:
    """Reads the chunks in a directory, by columns or by partitions of the shuffled order."""

    def __init__(self, directory: Path) -> None:
        self.chunks = sorted(directory.glob("chunk-*.arrow"))

    def skipped(self) -> Iterator[dict[str, str]]:
        """Yield the records that were skipped, in the order of reading."""
        for path in self.chunks:
            with pa.memory_map(str(path)) as source:
                yield from parse_json(pa.ipc.open_file(source).schema.metadata[b"skipped"])

    def columns(self, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the named columns of each chunk as arrays."""
        for path in self.chunks:
            with pa.memory_map(str(path)) as source:
                table = _open(source, names).read_all()
                yield {name: table[name].to_numpy(zero_copy_only=False) for name in names}

    def rows(self, partition: ShufflePartition, names: Sequence[str] = SCHEMA.names) -> pa.Table:
        """Return the named columns of a partition, chunk by chunk, the rows of a chunk in the shuffled order.

        Args:
            partition: which rows.
            names: "key" among them.
        """
        tables = [SCHEMA.empty_table().select(names)]
        for path in self.chunks:
            with pa.memory_map(str(path)) as source:
                batch = _open(source, names).get_batch(partition.bucket)
                keys = batch["key"].to_numpy()
                # the batch is sorted, and the end of the last partition is beyond 64 bits
                start, stop = np.searchsorted(keys, np.uint64(partition.low)), len(keys)
                if partition.high < 1 << KEY_BITS:
                    stop = int(np.searchsorted(keys, np.uint64(partition.high)))
                tables.append(pa.table(pa.Table.from_batches([batch.slice(int(start), int(stop - start))]).select(names)))
        return pa.concat_tables(tables)


def _open(source: pa.NativeFile, names: Sequence[str]) -> Any:
    fields = [SCHEMA.get_field_index(name) for name in SCHEMA.names if name in names]
    return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields))
