"""Token shards: the immutable `Corpus` that `prepare` writes and everything else reads (`corpus_writer.py` writes it).

A corpus is a directory: token files of checksummed blocks (see `blocks.py`), tables of documents in parquet, one file that
says where documents start, and `index.json`, written last. The format is described in docs/data-format.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.data.filesystem import REMAKE, Folder
from sbp_fast.data.token_shards.blocks import Shards, open_tokens
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import hash_value, parse_json

FORMAT = 2
INDEX, OFFSETS = "index.json", "offsets.bin"
OFFSET_TYPE = np.dtype("<i8")
BATCH_TOKENS = 1 << 22


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


class Corpus:
    """Documents as token ids: `corpus[i]` is document i, its <begin> and <end> tokens included.

    Opening one reads the index alone; a local one is memory-mapped, a remote one read by ranges. The table of documents is
    read when first asked for, and only the columns that are.

    Args:
        directory: a local directory, or the URL of one that fsspec can open.

    Attributes:
        offsets: int64 [documents + 1], where each document starts in the stream of all tokens.
        ids, sources: str arrays [documents].
        text_bytes: int64 [documents], length of the original text in UTF-8 bytes.
        fingerprint: hash of content alone (tokens, ids, order, how they are stored), not of where they lie.

    Raises:
        UserError: no corpus, one of another format, a damaged one as far as opening can tell; later, by whatever reads a
            damaged file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = directory
        folder = self._folder = Folder(directory)
        if folder.size(INDEX) is None:
            raise UserError(directory, "holds no token shards", "make it with `sbp-fast prepare`")
        index = _read_index(folder)
        self.vocabulary_size: int = index["vocabulary_size"]
        self.fingerprint: str = index["fingerprint"]
        self.dtype = token_dtype(self.vocabulary_size)
        self._offsets_xxh3: str = index["offsets_xxh3"]
        self._shards = Shards(folder, index["shards"], self.dtype, index["compression"], index["block_tokens"])
        if folder.local:
            for shard in range(len(self._shards.facts)):
                self._shards.check_size(shard)
        self.offsets = _read_offsets(folder, index)
        self._reader = open_tokens(self._shards)
        self._starts = [0, *accumulate(shard["tokens"] for shard in self._shards.facts)]
        self._columns: dict[str, pa.ChunkedArray] = {}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        return self.slice(int(self.offsets[document]), int(self.offsets[document + 1]))

    @property
    def tokens(self) -> int:
        """Tokens of all documents together."""
        return int(self.offsets[-1])

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream of all documents; a view unless it crosses the end of a block or a shard."""
        shard = bisect_right(self._starts, start) - 1
        if start < stop <= self._starts[shard + 1]:
            low = self._starts[shard]
            return self._reader.slice(shard, start - low, stop - low)
        parts = [np.zeros(0, self.dtype)]
        while start < stop:
            low, end = self._starts[shard], min(stop, self._starts[shard + 1])
            if start < end:
                parts.append(self._reader.slice(shard, start - low, end - low))
            start, shard = end, shard + 1
        return np.concatenate(parts)

    def read(self, *, checked: bool = True) -> Iterator[np.ndarray]:
        """All tokens in order, a block at a time, each compared with its checksum unless `checked` is false."""
        left = self.tokens
        for shard in range(len(self._shards.facts)):
            for number in range(self._shards.blocks(shard)):
                if left == 0:
                    return
                block = self._reader.block(shard, number, checked)[:left]
                left -= len(block)
                yield block

    @property
    def shard_starts(self) -> np.ndarray:
        """The first document of each shard, then the number of all. int64 [shards + 1]"""
        ends = np.cumsum([0, *(facts["documents"] for facts in self._shards.facts)])
        ends = ends[: np.searchsorted(ends, len(self)) + 1]
        return np.minimum(ends, len(self))

    def shard(self, shard: int) -> tuple[pa.Table, np.ndarray]:
        """The table of one shard's documents, and their tokens, checked."""
        first, last = self.shard_starts[shard : shard + 2]
        blocks = [self._reader.block(shard, number, True) for number in range(self._shards.blocks(shard))]
        tokens = np.concatenate([np.zeros(0, self.dtype), *blocks])
        return pq.read_table(self._document_file(shard))[: last - first], tokens[: self.offsets[last] - self.offsets[first]]

    def shards(self) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """One shard after the other."""
        yield from map(self.shard, range(len(self.shard_starts) - 1))

    def batches(self, tokens: int = BATCH_TOKENS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All documents in order, as many at a time as have about so many tokens: these, and where each document starts
        among them, int64 [documents + 1]."""
        start = 0
        while start < len(self):
            stop = int(np.searchsorted(self.offsets, self.offsets[start] + tokens, "right")) - 1
            stop = min(max(stop, start + 1), len(self))
            offsets = self.offsets[start : stop + 1]
            yield self.slice(int(offsets[0]), int(offsets[-1])), offsets - offsets[0]
            start = stop

    @property
    def documents(self) -> pa.Table:
        """The table of documents, one row each."""
        return pa.table({name: self._column(name) for name in self.column_names})

    def column(self, name: str) -> np.ndarray:
        """One column of the document table as a numpy array [documents]."""
        return self._column(name).to_numpy(zero_copy_only=False)

    def column_parts(self, name: str) -> Iterator[np.ndarray]:
        """One column as `column` has it, a shard at a time: Python's strings take ten times their place on disk."""
        left = len(self)
        for shard in range(len(self.shard_starts) - 1):
            part = pq.read_table(self._document_file(shard), columns=[name])[name][:left]
            left -= len(part)
            yield part.to_numpy(zero_copy_only=False)

    @property
    def ids(self) -> np.ndarray:
        return self.column("id")

    def id(self, document: int) -> str:
        """The id of one document; only its shard's table is read."""
        starts = self.shard_starts
        shard = int(np.searchsorted(starts, document, "right")) - 1
        return pq.read_table(self._document_file(shard), columns=["id"])["id"][document - starts[shard]].as_py()

    @property
    def sources(self) -> np.ndarray:
        return self.column("source")

    @property
    def text_bytes(self) -> np.ndarray:
        return self.column("text_bytes").astype(np.int64)

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self._columns:
            parts = [pq.read_table(self._document_file(shard), columns=[name]) for shard in range(len(self._shards.facts))]
            self._columns[name] = pa.concat_tables(parts)[name] if parts else pa.chunked_array([[]])
        return self._columns[name].slice(0, len(self))

    @property
    def column_names(self) -> list[str]:
        """Of the table of documents."""
        return pq.read_schema(self._document_file(0)).names if self._shards.facts else []

    def _document_file(self, shard: int) -> pa.BufferReader:
        facts = self._shards.facts[shard]
        return pa.BufferReader(self._folder.read_checked(f"documents-{facts['name']}.parquet", facts["documents_xxh3"]))

    def verify(self) -> None:
        """Hash every file again. Opening a local corpus checks the files' sizes, reading it the tables and compressed tokens.

        Raises:
            UserError: naming the first file that is not as it was written, and of tokens the block.
        """
        if self._folder.hash(OFFSETS) != self._offsets_xxh3:
            raise UserError(self._folder.where(OFFSETS), "missing or not as it was written", REMAKE)
        for shard in range(len(self._shards.facts)):
            self._shards.verify(shard)
            self._document_file(shard)

    def prefix(self, documents: int) -> CorpusPrefix:
        """The first `documents` documents; of a shuffled corpus, a uniform random subset."""
        return CorpusPrefix(self, documents)


class CorpusPrefix(Corpus):
    """The head of a corpus, read through it."""

    def __init__(self, whole: Corpus, documents: int) -> None:
        if not 0 < documents <= len(whole):
            raise ValueError(f"a prefix of {documents} documents does not fit a corpus of {len(whole)}")
        self.__dict__.update(whole.__dict__)
        self.offsets = whole.offsets[: documents + 1]
        self.fingerprint = hash_value([whole.fingerprint, documents])


def _read_index(folder: Folder) -> dict[str, Any]:
    where = folder.where(INDEX)
    try:
        index = parse_json(folder.read(INDEX))
    except ValueError:
        raise UserError(where, "is no JSON", REMAKE) from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else None
        raise UserError(where, f"format {found} is not {FORMAT}", "make the corpus again with this version")
    if hash_value({key: value for key, value in index.items() if key != "fingerprint"}) != index.get("fingerprint"):
        raise UserError(where, "not as it was written", REMAKE)
    return index


def _read_offsets(folder: Folder, index: dict[str, Any]) -> np.ndarray:
    """Where documents start: mapped where that can be done, else read whole and checked."""
    expected = sum(shard["documents"] for shard in index["shards"]) + 1
    if folder.size(OFFSETS) != expected * OFFSET_TYPE.itemsize:
        raise UserError(folder.where(OFFSETS), "missing or not of the recorded size", REMAKE)
    if folder.local:
        offsets = folder.map(OFFSETS, OFFSET_TYPE)
    else:
        offsets = np.frombuffer(folder.read_checked(OFFSETS, index["offsets_xxh3"]), OFFSET_TYPE)
    if offsets[0] != 0 or offsets[-1] != sum(shard["tokens"] for shard in index["shards"]):
        raise UserError(folder.where(OFFSETS), "not as it was written", REMAKE)
    return offsets
