"""One partition of the shuffled order, tokenized and written as shards: the task of one process of `prepare`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sbp_fast.data.encoder import Encoder, EncoderName, make_encoder
from sbp_fast.data.holdout import SELECTION_COLUMNS, Decisions, select
from sbp_fast.data.shuffle import ShufflePartition, ShuffleReader
from sbp_fast.data.token_shards.blocks import Compression
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.data.tokenizer import TOKENIZER, Tokenizer

BATCH_DOCUMENTS = 512
BATCH_BYTES = 4 << 20
COLUMNS = ("id", "source", "text", "key_low")


@dataclass(frozen=True)
class TokenizeTask:
    """What one process needs to tokenize and write a partition.

    Attributes:
        directory: of the prepared corpus, with its tokenizer.
        shuffled: directory of the shuffled documents and the decisions about them.
        index: of the partition, which begins the names of its shards.
        tokenizer_hash: of the tokenizer's file.
        encoder: as `choose_encoder` named it.
    """

    directory: Path
    shuffled: Path
    index: int
    partition: ShufflePartition
    tokenizer_hash: str
    shard_tokens: int
    compression: Compression
    encoder: EncoderName


def write_partition(task: TokenizeTask) -> dict[str, Any]:
    """Write the shards of a partition's training documents and of its held-out ones.

    Returns:
        The shards' index entries under "train" and "heldout"; of the training documents "text_bytes", and under "sources" the
        number from each source.
    """
    rows = ShuffleReader(task.shuffled).rows(task.partition)
    columns = {name: rows[name].to_numpy() for name in SELECTION_COLUMNS}
    selected = select(columns, Decisions.load(task.shuffled))
    rows = rows.select(COLUMNS)
    train = rows.take(selected.train)
    return {
        "train": _write(train, "train", task),
        "heldout": _write(rows.take(selected.heldout), "heldout", task),
        "text_bytes": sum(pc.binary_length(train["text"]).to_numpy().tolist()),
        "sources": dict(sorted(Counter(train["source"].to_pylist()).items())),
    }


def _write(rows: pa.Table, split: str, task: TokenizeTask) -> list[dict[str, Any]]:
    tokenizer, encoder = _load(task.directory / TOKENIZER, task.tokenizer_hash, task.encoder)
    directory, prefix, size = task.directory / split, f"{task.index:05d}-", tokenizer.vocabulary_size
    writer = CorpusWriter(directory, size, task.shard_tokens, prefix=prefix, compression=task.compression)
    for batch in _batches(rows):
        tokens, lengths = tokenizer.enclose(*encoder.encode(batch["text"], batch["key_low"].to_numpy()))
        text_bytes = pc.binary_length(batch["text"])
        writer.add_batch(tokens, lengths, ids=batch["id"], sources=batch["source"], text_bytes=text_bytes)
    return writer.finish()


def _batches(rows: pa.Table) -> Iterator[pa.Table]:
    """Yield runs of rows, bounded in number and in bytes."""
    ends = np.cumsum(pc.binary_length(rows["text"]).to_numpy())
    start = 0
    while start < len(rows):
        limit = (ends[start - 1] if start else 0) + BATCH_BYTES
        stop = min(max(int(np.searchsorted(ends, limit, "right")), start + 1), start + BATCH_DOCUMENTS)
        yield rows.slice(start, stop - start)
        start = stop


@lru_cache(1)
def _load(path: Path, tokenizer_hash: str, encoder: EncoderName) -> tuple[Tokenizer, Encoder]:
    tokenizer = Tokenizer(path)
    return tokenizer, make_encoder(encoder, tokenizer)
