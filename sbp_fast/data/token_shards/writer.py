"""Writing token shards: documents singly or in batches, each shard whole on disk before the next is started, the index last.

A shard is written block by block, so that a block is checked, converted and hashed while it is in the CPU cache. `corpus.py`
lists the files of a corpus.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sbp_fast.data.token_shards.blocks import BLOCK_TOKENS, Compression, split_blocks, write_blocks
from sbp_fast.data.token_shards.corpus import FORMAT, INDEX, OFFSET_TYPE, OFFSETS, Corpus, token_dtype
from sbp_fast.pipeline.files import atomic_open, hash_file, hash_value, write_json

TYPES = {"id": pa.string(), "source": pa.string(), "text_bytes": pa.int64(), "tokens": pa.int64()}
JOINED_TOKENS = 1 << 20  # documents added singly become a batch when they have this many tokens


def write_shard(
    directory: Path,
    name: str,
    parts: Sequence[np.ndarray],
    table: pa.Table,
    *,
    vocabulary_size: int,
    compression: Compression = "none",
    block_tokens: int = BLOCK_TOKENS,
) -> dict[str, Any]:
    """Write the three files of one shard; returns its entry for `write_index`.

    Args:
        directory: of the corpus.
        name: of the shard.
        parts: integers, all documents concatenated, in arrays that may end anywhere.
        table: of the documents: id, source, text_bytes, tokens and any other columns.
        vocabulary_size: one more than the highest id.
        compression: see `blocks.py`.
        block_tokens: see `blocks.py`.

    Raises:
        ValueError: a token that is not in the vocabulary.
    """
    with atomic_open(directory / f"tokens-{name}.bin") as file:
        blocks, digest = write_blocks(_blocks(parts, block_tokens, vocabulary_size), compression, file)
    return {
        "name": name,
        "tokens": sum(map(len, parts)),
        "documents": len(table),
        "bytes": int(blocks["end"][-1]) if len(blocks) else 0,
        "tokens_xxh3": digest,
        "blocks_xxh3": _write(directory / f"blocks-{name}.bin", blocks.tobytes()),
        "documents_xxh3": _write(directory / f"documents-{name}.parquet", _parquet(table)),
    }


def shard_files(name: str) -> list[str]:
    """Return the names of the files of one shard."""
    return [f"tokens-{name}.bin", f"blocks-{name}.bin", f"documents-{name}.parquet"]


def _blocks(parts: Sequence[np.ndarray], block_tokens: int, vocabulary_size: int) -> Iterator[np.ndarray]:
    dtype = token_dtype(vocabulary_size)
    for block in split_blocks(parts, block_tokens):
        low, high = block.min(), block.max()
        if not 0 <= low <= high < vocabulary_size:
            raise _outside(low, high, vocabulary_size)
        yield np.ascontiguousarray(block, dtype)


def _outside(low: int, high: int, vocabulary_size: int) -> ValueError:
    return ValueError(f"tokens from {low} to {high} in a vocabulary of {vocabulary_size}")


def _parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    # one chunk, so that the bytes do not depend on batches; ids are distinct, and statistics are not used
    dictionaries = [name for name in table.column_names if name != "id"]
    pq.write_table(table.combine_chunks(), sink, use_dictionary=dictionaries, write_statistics=False)
    return sink.getvalue()


def _write(path: Path, content: bytes | pa.Buffer) -> str:
    """Write a small file; returns its xxh3-128 as hex."""
    with atomic_open(path) as file:
        file.write(content)
    return xxhash.xxh3_128_hexdigest(content)


def write_index(
    directory: Path,
    shards: Sequence[dict[str, Any]],
    *,
    vocabulary_size: int,
    compression: Compression = "none",
    block_tokens: int = BLOCK_TOKENS,
) -> Corpus:
    """Write the document offsets and the index of written shards, and open the corpus."""
    end = 0
    with atomic_open(directory / OFFSETS) as file:
        file.write(np.zeros(1, OFFSET_TYPE).tobytes())
        for shard in shards:
            lengths = pq.read_table(directory / f"documents-{shard['name']}.parquet", columns=["tokens"])["tokens"].to_numpy()
            file.write((end + np.cumsum(lengths, dtype=OFFSET_TYPE)).astype(OFFSET_TYPE).tobytes())
            end += shard["tokens"]
    index = {
        "format": FORMAT,
        "vocabulary_size": vocabulary_size,
        "dtype": token_dtype(vocabulary_size).str,
        "compression": compression,
        "block_tokens": block_tokens,
        "offsets_xxh3": hash_file(directory / OFFSETS),
        "shards": list(shards),
    }
    write_json(directory / INDEX, {**index, "fingerprint": hash_value(index)})
    return Corpus(directory)


class CorpusWriter:
    """Writes a corpus shard by shard; each finished shard is whole on disk, the index comes last.

    Args:
        directory: of the corpus; created if it does not exist.
        vocabulary_size: one more than the highest id.
        shard_tokens: the document that brings a shard to this number of tokens closes it.
        prefix: of the shards' names, before their index.
        compression: see `blocks.py`.
        block_tokens: see `blocks.py`.
    """

    def __init__(
        self,
        directory: Path,
        vocabulary_size: int,
        shard_tokens: int = 1 << 24,
        *,
        prefix: str = "",
        compression: Compression = "none",
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.prefix = prefix
        self.directory, self.vocabulary_size, self.shard_tokens = Path(directory), vocabulary_size, shard_tokens
        self.directory.mkdir(parents=True, exist_ok=True)
        self.shards: list[dict[str, Any]] = []
        self._storage: dict[str, Any] = {
            "vocabulary_size": vocabulary_size,
            "compression": compression,
            "block_tokens": block_tokens,
        }
        self._schema: pa.Schema | None = None
        self._begin_shard()
        self._begin_rows()

    def _begin_shard(self) -> None:
        self._parts: list[np.ndarray] = []
        self._tables: list[pa.Table] = []
        self._pending = 0

    def _begin_rows(self) -> None:
        # a list for each column: the garbage collector would visit rows one by one
        self._documents: list[np.ndarray | array[int]] = []
        self._lengths: list[int] = []
        self._ids: list[str] = []
        self._sources: list[str] = []
        self._text_bytes: list[int] = []
        self._more: dict[str, list[Any]] = {}
        self._joined = 0

    def add(self, tokens: np.ndarray | Sequence[int], *, id: str, source: str, text_bytes: int, **columns: Any) -> None:
        """Append a document, its <begin> and <end> included; `columns` go to its row, the same columns for all documents.

        An array is not copied: it must not change before the corpus is finished.

        Raises:
            ValueError: other columns than those of earlier documents.
        """
        if not self._lengths:
            self._more = {name: [] for name in columns}
        elif columns.keys() != self._more.keys():
            raise ValueError(f"columns {', '.join(columns)} of a table that has {', '.join(self._more)}")
        if isinstance(tokens, list):
            self._add_list(tokens)
        else:
            self._documents.append(np.asarray(tokens))
        self._lengths.append(len(tokens))
        self._ids.append(id)
        self._sources.append(source)
        self._text_bytes.append(text_bytes)
        for name, value in columns.items():
            self._more[name].append(value)
        self._joined += len(tokens)
        if self._joined >= JOINED_TOKENS:
            self._join()

    def _add_list(self, tokens: list[int]) -> None:
        last = self._documents[-1] if self._documents else None
        if not isinstance(last, array):
            last = array("I")
            self._documents.append(last)
        try:
            last.fromlist(tokens)  # four times as fast as numpy
        except OverflowError:
            raise _outside(min(tokens), max(tokens), self.vocabulary_size) from None

    def _join(self) -> None:
        """Make a batch of the documents added singly."""
        if not self._lengths:
            return
        documents, lengths, more = self._documents, self._lengths, self._more
        names = {"ids": self._ids, "sources": self._sources, "text_bytes": self._text_bytes}
        self._begin_rows()
        parts = [np.asarray(document) for document in documents if len(document)]
        self.add_batch(np.concatenate(parts or [np.zeros(0, np.int64)]), lengths, **names, **more)

    def add_batch(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray | Sequence[int],
        *,
        ids: Any,
        sources: Any,
        text_bytes: Any,
        **columns: Any,
    ) -> None:
        """Append concatenated documents, with the same result as adding them singly.

        Args:
            tokens: integers [tokens]; not copied, so it must not change before the corpus is finished.
            lengths: of the documents, integers [documents].
            ids: [documents], a list, numpy or Arrow array, as the other columns.
            sources: [documents].
            text_bytes: [documents].
            columns: other columns of the rows, each [documents].

        Raises:
            ValueError: lengths that do not add up to the tokens, columns of another length, other columns than those of the
                documents before.
        """
        self._join()
        lengths = np.asarray(lengths, np.int64)
        if lengths.min(initial=0) < 0 or lengths.sum() != len(tokens):
            raise ValueError(f"{len(tokens)} tokens for documents of {lengths.sum()}, none shorter than 0")
        table = self._table({"id": ids, "source": sources, "text_bytes": text_bytes, "tokens": lengths, **columns})
        ends = np.cumsum(lengths)
        first = start = 0
        while first < len(ends):
            last = int(np.searchsorted(ends, start + self.shard_tokens - self._pending))  # the document that closes the shard
            beyond = min(last + 1, len(ends))
            end = int(ends[beyond - 1])
            self._parts.append(tokens[start:end])
            self._tables.append(table.slice(first, beyond - first))
            self._pending += end - start
            first, start = beyond, end
            if self._pending >= self.shard_tokens:
                self._flush()

    def _table(self, columns: Mapping[str, Any]) -> pa.Table:
        table = pa.table(dict(columns))
        table = table.cast(pa.schema([(field.name, TYPES.get(field.name, field.type)) for field in table.schema]))
        if self._schema is None and len(table):
            self._schema = table.schema
        if len(table) and table.schema != self._schema:
            raise ValueError(f"columns {_listed(table.schema)} of a table that has {_listed(self._schema)}")
        return table

    def _flush(self) -> None:
        if not self._tables:
            return
        name = f"{self.prefix}{len(self.shards):05d}"
        table = pa.concat_tables(self._tables)
        self.shards.append(write_shard(self.directory, name, self._parts, table, **self._storage))
        self._begin_shard()

    def finish(self) -> list[dict[str, Any]]:
        """Finish the last shard; returns the entries of all for `write_index`."""
        self._join()
        self._flush()
        return self.shards

    def close(self) -> Corpus:
        """Finish the last shard, write the index and open the corpus."""
        return write_index(self.directory, self.finish(), **self._storage)


def _listed(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
