"""Documents on their way through `prepare`: read once, and laid down on disk so that any part of the shuffled order can be
taken up alone.

A document's place in the shuffled order is a hash of its text under the run's seed, so that exact copies lie side by side.
The order is cut into buckets. What is read is laid down in pieces, Arrow files with one record batch a bucket, each the work
of one process in bounded memory; a part of the order is then that bucket's batch of every piece.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from sbp_fast.config import CorpusConfig
from sbp_fast.data.documents import Document, File, head_of, read_file
from sbp_fast.data.passages import cut_passages
from sbp_fast.errors import Unreachable, UserError
from sbp_fast.pipeline.files import atomic_open, read_json, write_json

DOCUMENT_WEIGHT = 256  # bytes that a document takes in memory beside its text
KEY_BITS = 64
NUMBER_BITS = 40  # of a document's number in its file; the rest is the file's number
SCHEMA = pa.schema(
    {
        "high": pa.uint64(),  # the hash of the text under the seed: its place in the order...
        "low": pa.uint64(),  # ...and what tells texts apart that share the place
        "number": pa.uint64(),  # its place in the order of reading
        "original": pa.uint64(),  # hash of the record's id...
        "head": pa.uint64(),  # ...and of the id up to its last separator
        "passage": pa.int32(),  # which of its record, -1 where that is whole
        "heldout": pa.bool_(),  # whether it was given to be held out
        "id": pa.string(),
        "source": pa.string(),
        "text": pa.large_string(),
    }
)


@dataclass(frozen=True)
class Reading:
    """What one process needs to read a file and lay it down.

    Attributes:
        number: of the file in the order of reading.
        limit: documents to read at most.
        piece_bytes: a piece is closed by the document that brings it to this, DOCUMENT_WEIGHT counted for each.
    """

    directory: Path
    file: File
    number: int
    heldout: bool
    config: CorpusConfig
    seed: int
    buckets: int
    piece_bytes: int
    limit: int | None = None


@dataclass(frozen=True)
class Part:
    """A run of the shuffled order: the documents of `bucket` whose place is in [low, high)."""

    bucket: int
    low: int
    high: int


def hash_name(name: str, seed: int) -> int:
    """64 bits of a name, by which originals are told apart and put in order."""
    return xxhash.xxh3_64_intdigest(name.encode(), seed)


def bucket_starts(buckets: int) -> list[int]:
    """Where in the order each bucket starts, and the end of the last."""
    return [-(-(bucket << KEY_BITS) // buckets) for bucket in range(buckets + 1)]


def lay_down(reading: Reading) -> dict[str, Any]:
    """Read a file and lay it down in pieces, going on after those that an earlier attempt finished.

    Returns:
        "documents" read, "passages" made of them, "skipped" records; under "source" the documents of each, under "bucket" the
        bytes of each, DOCUMENT_WEIGHT counted for a document.

    Raises:
        UserError: the first record that cannot be used, unless `on_error` is "skip"; a store that fails, always.
    """
    done = reading.directory / f"file-{reading.number:06d}.json"
    if done.is_file():
        return _counted(read_json(done))
    pieces = sorted(reading.directory.glob(f"piece-{reading.number:06d}-*.arrow"))
    builder = _Builder(reading, len(pieces), Counter())
    for path in pieces:
        builder.total.update(_summary(path))
    items = islice(read_file(reading.file, reading.config), builder.total["items"], None)
    limit = reading.limit if reading.limit is not None else float("inf")
    while builder.total["documents"] + builder.counts["documents"] < limit and (item := next(items, None)) is not None:
        builder.add(item)
    builder.close()
    write_json(done, builder.total)
    return _counted(builder.total)


def _counted(total: Mapping[str, int]) -> dict[str, Any]:
    """Counters whose keys are "bucket:3" and "source:news", as dictionaries of their own."""
    found: dict[str, Any] = {key: total.get(key, 0) for key in ("documents", "passages", "skipped")}
    for kind in ("source", "bucket"):
        names = {key.partition(":")[2]: value for key, value in total.items() if key.startswith(f"{kind}:")}
        found[kind] = names
    return found


class _Builder:
    """Gathers the rows of one piece after another."""

    def __init__(self, reading: Reading, pieces: int, total: Counter[str]) -> None:
        self.reading, self.pieces, self.total = reading, pieces, total
        self._clear()

    def _clear(self) -> None:
        self.rows: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        self.skipped: list[dict[str, str]] = []
        self.counts: Counter[str] = Counter()
        self.weight = 0

    def add(self, item: Document | UserError) -> None:
        self.counts["items"] += 1
        self.weight += DOCUMENT_WEIGHT
        if isinstance(item, UserError):
            self._skip(item)
        else:
            self._take(item)
        if self.weight >= self.reading.piece_bytes:
            self.close()

    def _skip(self, error: UserError) -> None:
        if self.reading.config.on_error == "stop" or isinstance(error, Unreachable):
            raise error
        file = self.reading.file
        where = error.where.replace(file.shown, "/".join(file.parts), 1)  # the same wherever the files lie
        self.skipped.append({"where": where, "what": error.what})
        self.counts["skipped"] += 1

    def _take(self, document: Document) -> None:
        config, seed = self.reading.config, self.reading.seed
        separator, limit = config.group_separator, config.passage_characters
        names = {"original": hash_name(document.id, seed), "head": hash_name(head_of(document.id, separator), seed)}
        common = {**names, "heldout": self.reading.heldout, "source": document.source}
        self.counts.update({"documents": 1, f"source:{document.source}": 1})
        if not limit or len(document.text) <= limit:
            self._row(document.id, document.text, -1, common)
            return
        for number, passage in enumerate(cut_passages(document.text, limit)):
            self._row(f"{document.id}{separator or '/'}{number:04d}", passage, number, common)
            self.counts["passages"] += 1

    def _row(self, id: str, text: str, passage: int, common: dict[str, Any]) -> None:
        content = text.encode()
        digest = xxhash.xxh3_128_intdigest(content, self.reading.seed)
        self.counts["rows"] += 1
        number = self.reading.number << NUMBER_BITS | self.total["rows"] + self.counts["rows"]
        place = {"high": digest >> KEY_BITS, "low": digest & (1 << KEY_BITS) - 1, "number": number, "passage": passage}
        for name, value in {**common, **place, "id": id, "text": text}.items():
            self.rows[name].append(value)
        weight = len(content) + DOCUMENT_WEIGHT
        self.weight += weight
        self.counts[f"bucket:{place['high'] * self.reading.buckets >> KEY_BITS}"] += weight

    def close(self) -> None:
        if not self.counts["items"]:
            return
        path = self.reading.directory / f"piece-{self.reading.number:06d}-{self.pieces:06d}.arrow"
        table = pa.table(self.rows, SCHEMA)
        places = table["high"].to_numpy()
        order = np.argsort(places, kind="stable")
        bounds = np.searchsorted(places[order], np.array(bucket_starts(self.reading.buckets)[:-1], np.uint64)).tolist()
        summary = {"counts": json.dumps(self.counts), "skipped": json.dumps(self.skipped)}
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with atomic_open(path) as file, pa.ipc.new_file(file, SCHEMA.with_metadata(summary), options=options) as writer:
            for start, stop in zip(bounds, [*bounds[1:], len(order)], strict=True):
                writer.write_batch(_one_batch(table.take(order[start:stop])))
        self.pieces += 1
        self.total.update(self.counts)
        self._clear()


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    columns = [column.combine_chunks() for column in table.columns]
    return pa.RecordBatch.from_arrays(
        [column.chunk(0) if isinstance(column, pa.ChunkedArray) else column for column in columns], schema=SCHEMA
    )


def _summary(path: Path) -> dict[str, int]:
    with pa.memory_map(str(path)) as source:
        return json.loads(pa.ipc.open_file(source).schema.metadata[b"counts"])


class Spill:
    """All that was laid down, by parts of the shuffled order."""

    def __init__(self, directory: Path) -> None:
        self.pieces = sorted(directory.glob("piece-*.arrow"))

    def skipped(self) -> Iterator[dict[str, str]]:
        """The records that were skipped, in the order of reading."""
        for path in self.pieces:
            with pa.memory_map(str(path)) as source:
                yield from json.loads(pa.ipc.open_file(source).schema.metadata[b"skipped"])

    def facts(self, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """The named columns of each piece, as arrays."""
        for path in self.pieces:
            with pa.memory_map(str(path)) as source:
                table = _open(source, names).read_all()
                yield {name: table[name].to_numpy(zero_copy_only=False) for name in names}

    def rows(self, part: Part, names: Sequence[str] = SCHEMA.names) -> pa.Table:
        """The named columns of a part, piece by piece, those of a piece in the shuffled order; "high" must be among them."""
        found = [SCHEMA.empty_table().select(names)]
        for path in self.pieces:
            with pa.memory_map(str(path)) as source:
                batch = _open(source, names).get_batch(part.bucket)
                places = batch["high"].to_numpy()
                # the batch is sorted, and the end of the last part is beyond 64 bits
                start, stop = np.searchsorted(places, np.uint64(part.low)), len(places)
                if part.high < 1 << KEY_BITS:
                    stop = int(np.searchsorted(places, np.uint64(part.high)))
                found.append(pa.table(pa.Table.from_batches([batch.slice(int(start), int(stop - start))]).select(names)))
        return pa.concat_tables(found)


def _open(source: pa.NativeFile, names: Sequence[str]) -> Any:
    fields = [SCHEMA.get_field_index(name) for name in SCHEMA.names if name in names]
    return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields))


def cut_parts(weights: Mapping[str, int], buckets: int, part_bytes: int) -> list[Part]:
    """The shuffled order in parts of about `part_bytes` at most: buckets, and pieces of those that came out too large."""
    starts, parts = bucket_starts(buckets), []
    for bucket in range(buckets):
        count = max(1, -(-weights.get(str(bucket), 0) // part_bytes))
        width = starts[bucket + 1] - starts[bucket]
        edges = [starts[bucket] + width * number // count for number in range(count + 1)]
        parts += [Part(bucket, low, high) for low, high in pairwise(edges)]
    return parts
