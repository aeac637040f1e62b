"""Token shards in the formats of other projects: Megatron-LM's indexed dataset, MosaicML's MDS, and parquet.

Documents keep their order and their <begin> and <end>. All blocks and tables are checked against their checksums.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import atomic_open, atomic_path, dump_json, write_json

MEGATRON_MAGIC, MEGATRON_VERSION = b"MMIDIDX\x00\x00", 1
MEGATRON_TYPES = {"uint16": 8, "uint32": 4}  # the format has no uint32; 4 is int32, whose bits are the same below 2^31
MDS_SHARD_BYTES = 1 << 26
MDS_COLUMNS = ("id", "source", "tokens")  # in alphabetical order, as the format requires
CHUNK_NUMBERS = 1 << 20  # numbers of an index written at once


def write_megatron(corpus: Corpus, directory: Path) -> None:
    """Write an indexed dataset of Megatron-LM: `tokens.bin` and `tokens.idx`, a sequence and a document each."""
    with atomic_open(directory / "tokens.bin") as file:
        for block in corpus.read():
            file.write(block.data)
    documents, size = len(corpus), corpus.dtype.itemsize
    with atomic_open(directory / "tokens.idx") as file:
        file.write(MEGATRON_MAGIC)
        file.write(struct.pack("<QBQQ", MEGATRON_VERSION, MEGATRON_TYPES[corpus.dtype.name], documents, documents + 1))
        for start in range(0, documents, CHUNK_NUMBERS):
            file.write(np.diff(corpus.offsets[start : start + CHUNK_NUMBERS + 1]).astype("<i4").tobytes())
        for start in range(0, documents, CHUNK_NUMBERS):
            file.write((corpus.offsets[:-1][start : start + CHUNK_NUMBERS] * size).astype("<i8").tobytes())
        for start in range(0, documents + 1, CHUNK_NUMBERS):
            file.write(np.arange(start, min(start + CHUNK_NUMBERS, documents + 1), dtype="<i8").tobytes())


def write_parquet(corpus: Corpus, directory: Path) -> None:
    """Write a parquet file for each shard: its table of documents, with the ids themselves as the column `tokens`."""
    for index, (table, tokens) in enumerate(corpus.shards()):
        ends = np.cumsum(table["tokens"].to_numpy(), dtype=np.int64)
        lists = pa.LargeListArray.from_arrays(np.concatenate([[0], ends]), pa.array(tokens))
        with atomic_path(directory / f"documents-{index:05d}.parquet") as path:
            pq.write_table(table.set_column(table.schema.get_field_index("tokens"), "tokens", lists), path, compression="zstd")


def write_mds(corpus: Corpus, directory: Path) -> None:
    """Write a dataset of MosaicML streaming: `index.json` and its shards with the columns id, source and tokens.

    Raises:
        UserError: a document without tokens, which the format cannot hold.
    """
    encodings = ["str", "str", f"ndarray:{corpus.dtype.name}"]
    columns = {"column_names": list(MDS_COLUMNS), "column_encodings": encodings, "column_sizes": [None] * len(encodings)}
    common = {"compression": None, "format": "mds", "hashes": [], "size_limit": MDS_SHARD_BYTES, "version": 2, **columns}
    shards: list[dict[str, Any]] = []
    pending: list[bytes] = []
    size = 0

    def flush(samples: list[bytes]) -> None:
        name = f"shard.{len(shards):05d}.mds"
        entry = {"raw_data": {"basename": name, "bytes": _write_mds(directory / name, samples, common), "hashes": {}}}
        shards.append({**common, **entry, "samples": len(samples), "zip_data": None})

    for sample in _mds_samples(corpus):
        if pending and size + len(sample) > MDS_SHARD_BYTES:
            flush(pending)
            pending, size = [], 0
        pending.append(sample)
        size += len(sample) + 4
    if pending:
        flush(pending)
    write_json(directory / "index.json", {"version": 2, "shards": shards})


def _write_mds(path: Path, samples: list[bytes], common: dict[str, Any]) -> int:
    """Write the number of samples, where each starts and the last ends, the settings, the samples; returns the file's size."""
    settings = dump_json(common, path, sort_keys=True).encode()
    starts = np.cumsum([0, *map(len, samples)]) + 4 * (len(samples) + 2) + len(settings)
    with atomic_open(path) as file:
        file.write(struct.pack("<I", len(samples)) + starts.astype("<u4").tobytes() + settings)
        file.writelines(samples)
    return int(starts[-1])


def _mds_samples(corpus: Corpus) -> Iterator[bytes]:
    """Yield each document: the lengths of its columns, then the columns."""
    for table, tokens in corpus.shards():
        ends = np.cumsum([0, *table["tokens"].to_pylist()]).tolist()
        names = zip(table["id"].to_pylist(), table["source"].to_pylist(), pairwise(ends), strict=True)
        for id, source, (start, stop) in names:
            if start == stop:
                raise UserError(f"document {id!r}", "holds no tokens, which MDS cannot store", "export to another format")
            parts = [id.encode(), source.encode(), _mds_array(tokens[start:stop])]
            yield struct.pack("<3I", *map(len, parts)) + b"".join(parts)


def _mds_array(values: np.ndarray) -> bytes:
    """Encode one axis, in the narrowest integer that holds its length, then the values."""
    kind = next(kind for kind in range(4) if len(values) < 1 << (8 << kind))
    return bytes([1 << 2 | kind]) + len(values).to_bytes(1 << kind, "little") + values.tobytes()


FORMATS: dict[str, Callable[[Corpus, Path], None]] = {
    "megatron": write_megatron,
    "mds": write_mds,
    "parquet": write_parquet,
}
"""Format -> the function that writes a corpus in it."""
