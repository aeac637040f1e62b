"""One part of the shuffled order, tokenized and written as shards: the work of one process of `prepare`."""

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
from sbp_fast.data.holdout import FACTS, Decisions, select
from sbp_fast.data.shuffle import Part, Spill
from sbp_fast.data.token_shards.blocks import Compression
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.data.tokenizer import Tokenizer

BATCH_DOCUMENTS = 512
BATCH_BYTES = 4 << 20
COLUMNS = ("id", "source", "text", "low")


@dataclass(frozen=True)
class Writing:
    """What one process needs to write part `number`.

    Attributes:
        directory: of the prepared corpus, with its tokenizer.
        spill: where the documents were laid down.
        tokenizer: hash of the tokenizer's file.
        encoder: as `choose_encoder` named it.
    """

    directory: Path
    spill: Path
    number: int
    part: Part
    tokenizer: str
    shard_tokens: int
    compression: Compression
    encoder: EncoderName


def write_part(writing: Writing) -> dict[str, Any]:
    """Write the part's shards of documents to train on and of those held out.

    Returns:
        The shards' entries under "train" and "heldout"; of the documents to train on the "text_bytes" and the number of
        each of the "sources".
    """
    rows = Spill(writing.spill).rows(writing.part)
    chosen = select({name: rows[name].to_numpy() for name in FACTS}, Decisions.load(writing.spill))
    rows = rows.select(COLUMNS)
    train = rows.take(chosen.train)
    return {
        "train": _write(train, "train", writing),
        "heldout": _write(rows.take(chosen.heldout), "heldout", writing),
        "text_bytes": sum(pc.binary_length(train["text"]).to_numpy().tolist()),
        "sources": dict(sorted(Counter(train["source"].to_pylist()).items())),
    }


def _write(rows: pa.Table, kind: str, writing: Writing) -> list[dict[str, Any]]:
    tokenizer, encoder = _load(writing.directory / "tokenizer.json", writing.tokenizer, writing.encoder)
    directory, prefix, size = writing.directory / kind, f"{writing.number:05d}-", tokenizer.vocabulary_size
    writer = CorpusWriter(directory, size, writing.shard_tokens, prefix=prefix, compression=writing.compression)
    for batch in _batches(rows):
        tokens, lengths = tokenizer.enclose(*encoder.encode(batch["text"], batch["low"].to_numpy()))
        text_bytes = pc.binary_length(batch["text"])
        writer.add_batch(tokens, lengths, ids=batch["id"], sources=batch["source"], text_bytes=text_bytes)
    return writer.finish()


def _batches(rows: pa.Table) -> Iterator[pa.Table]:
    """Runs of rows, neither too many nor too long."""
    ends = np.cumsum(pc.binary_length(rows["text"]).to_numpy())
    start = 0
    while start < len(rows):
        limit = (ends[start - 1] if start else 0) + BATCH_BYTES
        stop = min(max(int(np.searchsorted(ends, limit, "right")), start + 1), start + BATCH_DOCUMENTS)
        yield rows.slice(start, stop - start)
        start = stop


@lru_cache(1)
def _load(path: Path, digest: str, encoder: EncoderName) -> tuple[Tokenizer, Encoder]:
    tokenizer = Tokenizer(path)
    return tokenizer, make_encoder(encoder, tokenizer)
