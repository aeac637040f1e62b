"""Token shards in the formats of other projects: Megatron-LM's indexed dataset, MosaicML's MDS, and parquet.

Documents keep their order and their <begin> and <end>. What is read is checked against its checksums.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import atomic_open, atomic_path, write_json
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import Manifest, Work, run_stage

Format = Literal["megatron", "mds", "parquet"]
MEGATRON_MAGIC, MEGATRON_VERSION = b"MMIDIDX\x00\x00", 1
MEGATRON_TYPES = {"uint16": 8, "uint32": 4}  # it knows no uint32: 4 is int32, the same bits for any vocabulary there is
MDS_SHARD_BYTES = 1 << 26
MDS_COLUMNS = ("id", "source", "tokens")  # in the order of their names, as the format wants them
WRITTEN_AT_ONCE = 1 << 20  # numbers


def export_tokens(corpus: str | Path, to: str, out: Path, *, console: Console, force: bool = False) -> Manifest:
    """Write a token corpus so that another project reads it.

    Megatron: `tokens.bin` and `tokens.idx`, a sequence and a document each. MDS: `index.json` and its shards with the columns
    id, source and tokens. Parquet: a file for each shard with the columns of its table, `tokens` the ids themselves.

    Raises:
        UserError: no corpus, or a damaged one; an unknown format; a document that the format cannot hold; what `run_stage`
            refuses.
    """
    writers: dict[str, Callable[[Corpus, Path], None]] = {"megatron": _megatron, "mds": _mds, "parquet": _parquet}
    if to not in writers:
        raise UserError(f"--to {to}", "no such format", f"choose from {', '.join(get_args(Format))}")
    opened = Corpus(corpus)

    def body(work: Work) -> None:
        writers[to](opened, work.directory)
        work.record(documents=len(opened), tokens=opened.tokens)

    inputs = {"corpus": opened.fingerprint}
    return run_stage("export-tokens", out, config={"to": to}, inputs=inputs, body=body, console=console, force=force)


def _megatron(corpus: Corpus, directory: Path) -> None:
    with atomic_open(directory / "tokens.bin") as file:
        for block in corpus.read():
            file.write(block.data)
    documents, size = len(corpus), corpus.dtype.itemsize
    with atomic_open(directory / "tokens.idx") as file:
        file.write(MEGATRON_MAGIC)
        file.write(struct.pack("<QBQQ", MEGATRON_VERSION, MEGATRON_TYPES[corpus.dtype.name], documents, documents + 1))
        for start in range(0, documents, WRITTEN_AT_ONCE):
            file.write(np.diff(corpus.offsets[start : start + WRITTEN_AT_ONCE + 1]).astype("<i4").tobytes())
        for start in range(0, documents, WRITTEN_AT_ONCE):
            file.write((corpus.offsets[:-1][start : start + WRITTEN_AT_ONCE] * size).astype("<i8").tobytes())
        for start in range(0, documents + 1, WRITTEN_AT_ONCE):
            file.write(np.arange(start, min(start + WRITTEN_AT_ONCE, documents + 1), dtype="<i8").tobytes())


def _parquet(corpus: Corpus, directory: Path) -> None:
    for number, (table, tokens) in enumerate(corpus.shards()):
        ends = np.cumsum(table["tokens"].to_numpy(), dtype=np.int64)
        lists = pa.LargeListArray.from_arrays(np.concatenate([[0], ends]), pa.array(tokens))
        with atomic_path(directory / f"documents-{number:05d}.parquet") as path:
            pq.write_table(table.set_column(table.schema.get_field_index("tokens"), "tokens", lists), path, compression="zstd")


def _mds(corpus: Corpus, directory: Path) -> None:
    encodings = ["str", "str", f"ndarray:{corpus.dtype.name}"]
    columns = {"column_names": list(MDS_COLUMNS), "column_encodings": encodings, "column_sizes": [None] * len(encodings)}
    common = {"compression": None, "format": "mds", "hashes": [], "size_limit": MDS_SHARD_BYTES, "version": 2, **columns}
    shards: list[dict[str, Any]] = []
    held: list[bytes] = []
    size = 0

    def flush(samples: list[bytes]) -> None:
        name = f"shard.{len(shards):05d}.mds"
        facts = {"raw_data": {"basename": name, "bytes": _write_mds(directory / name, samples, common), "hashes": {}}}
        shards.append({**common, **facts, "samples": len(samples), "zip_data": None})

    for sample in _mds_samples(corpus):
        if held and size + len(sample) > MDS_SHARD_BYTES:
            flush(held)
            held, size = [], 0
        held.append(sample)
        size += len(sample) + 4
    if held:
        flush(held)
    write_json(directory / "index.json", {"version": 2, "shards": shards})


def _write_mds(path: Path, samples: list[bytes], common: dict[str, Any]) -> int:
    """Number of samples, where each starts and the last ends, the settings, the samples; returns the bytes of it all."""
    settings = json.dumps(common, sort_keys=True).encode()
    starts = np.cumsum([0, *map(len, samples)]) + 4 * (len(samples) + 2) + len(settings)
    with atomic_open(path) as file:
        file.write(struct.pack("<I", len(samples)) + starts.astype("<u4").tobytes() + settings)
        file.writelines(samples)
    return int(starts[-1])


def _mds_samples(corpus: Corpus) -> Iterator[bytes]:
    """Each document: the lengths of its columns, then the columns."""
    for table, tokens in corpus.shards():
        ends = np.cumsum([0, *table["tokens"].to_pylist()]).tolist()
        names = zip(table["id"].to_pylist(), table["source"].to_pylist(), pairwise(ends), strict=True)
        for id, source, (start, stop) in names:
            if start == stop:
                raise UserError(f"document {id!r}", "holds no tokens, which MDS cannot store", "export to another format")
            parts = [id.encode(), source.encode(), _mds_array(tokens[start:stop])]
            yield struct.pack("<3I", *map(len, parts)) + b"".join(parts)


def _mds_array(values: np.ndarray) -> bytes:
    """One axis, in the narrowest integer that holds its length, then the values."""
    kind = next(kind for kind in range(4) if len(values) < 1 << (8 << kind))
    return bytes([1 << 2 | kind]) + len(values).to_bytes(1 << kind, "little") + values.tobytes()
