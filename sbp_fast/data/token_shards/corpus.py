"""Token shards: the immutable `Corpus` that `prepare` writes (`writer.py`) and everything else reads.

A corpus is a directory: token files of checksummed blocks (see `blocks.py`), tables of documents in parquet, a file of document
offsets, and `index.json`, written last. docs/data-format.md describes the format.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

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
    """Return the narrowest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


class Corpus:
    """Documents as token ids: `corpus[i]` is document i, its <begin> and <end> tokens included, `corpus[-1]` the last one.

    `corpus[first:last]` is a list of documents. The arrays of a local corpus are read-only views of its files: copy one to
    change it, as `torch.tensor(corpus[i])` does. A corpus can be pickled, for the worker processes of a DataLoader; it is
    opened again there.

    Opening a corpus reads only its index. A local one is memory-mapped, a remote one read by ranges. Columns of the table of
    documents are read when first asked for.

    Args:
        directory: a local directory, or the URL of one that fsspec can open.

    Attributes:
        offsets: int64 [documents + 1], where each document starts among all tokens.
        vocabulary_size: one more than the highest id.
        dtype: of the tokens.
        fingerprint: hash of the content (tokens, ids, order, storage), not of its location.

    Raises:
        UserError: no corpus, one of another format, or a damaged one as far as opening can tell; every method that reads a
            damaged file raises one, too.
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
            for shard in range(len(self._shards.entries)):
                self._shards.check_size(shard)
        self.offsets = _read_offsets(folder, index)
        self._reader = open_tokens(self._shards)
        self._starts = [0, *accumulate(shard["tokens"] for shard in self._shards.entries)]
        self._columns: dict[str, pa.ChunkedArray] = {}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, document: int | np.integer[Any]) -> np.ndarray: ...

    @overload
    def __getitem__(self, document: slice) -> list[np.ndarray]: ...

    def __getitem__(self, document: int | np.integer[Any] | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(document, slice):
            return [self[index] for index in range(*document.indices(len(self)))]
        index = int(document) + len(self) * (document < 0)
        if not 0 <= index < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        return self.slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.directory,)

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents together."""
        return int(self.offsets[-1])

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of all documents; a view unless the range crosses the end of a block or a shard."""
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
        """Yield all tokens in order, a block at a time, each compared with its checksum unless `checked` is false."""
        left = self.tokens
        for shard in range(len(self._shards.entries)):
            for index in range(self._shards.blocks(shard)):
                if left == 0:
                    return
                block = self._reader.block(shard, index, checked)[:left]
                left -= len(block)
                yield block

    @property
    def shard_starts(self) -> np.ndarray:
        """The first document of each shard, then the number of all documents. int64 [shards + 1]."""
        ends = np.cumsum([0, *(entry["documents"] for entry in self._shards.entries)])
        ends = ends[: np.searchsorted(ends, len(self)) + 1]
        return np.minimum(ends, len(self))

    def shard(self, shard: int) -> tuple[pa.Table, np.ndarray]:
        """Read and check the table of one shard's documents, and their tokens."""
        first, last = self.shard_starts[shard : shard + 2]
        blocks = [self._reader.block(shard, index, True) for index in range(self._shards.blocks(shard))]
        tokens = np.concatenate([np.zeros(0, self.dtype), *blocks])
        return pq.read_table(self._document_file(shard))[: last - first], tokens[: self.offsets[last] - self.offsets[first]]

    def shards(self) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Yield `shard` of one shard after the other."""
        yield from map(self.shard, range(len(self.shard_starts) - 1))

    def batches(self, tokens: int = BATCH_TOKENS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all documents in order, in batches of about `tokens` tokens.

        Yields:
            The tokens of a batch, and where each document starts among them, int64 [documents + 1].
        """
        start = 0
        while start < len(self):
            stop = int(np.searchsorted(self.offsets, self.offsets[start] + tokens, "right")) - 1
            stop = min(max(stop, start + 1), len(self))
            offsets = self.offsets[start : stop + 1]
            yield self.slice(int(offsets[0]), int(offsets[-1])), offsets - offsets[0]
            start = stop

    @property
    def documents(self) -> pa.Table:
        """The table of documents, one row for each."""
        return pa.table({name: self._column(name) for name in self.column_names})

    def column(self, name: str) -> np.ndarray:
        """Return one column of the table of documents as a numpy array [documents]."""
        return self._column(name).to_numpy(zero_copy_only=False)

    def column_parts(self, name: str) -> Iterator[np.ndarray]:
        """Yield one column a shard at a time: as Python strings, a whole column takes ten times its size on disk."""
        left = len(self)
        for shard in range(len(self.shard_starts) - 1):
            part = pq.read_table(self._document_file(shard), columns=[name])[name][:left]
            left -= len(part)
            yield part.to_numpy(zero_copy_only=False)

    @property
    def ids(self) -> np.ndarray:
        """Ids of the documents. str [documents]."""
        return self.column("id")

    def id(self, document: int) -> str:
        """Return the id of one document; only its shard's table is read."""
        starts = self.shard_starts
        shard = int(np.searchsorted(starts, document, "right")) - 1
        return pq.read_table(self._document_file(shard), columns=["id"])["id"][document - starts[shard]].as_py()

    @property
    def sources(self) -> np.ndarray:
        """Sources of the documents. str [documents]."""
        return self.column("source")

    @property
    def text_bytes(self) -> np.ndarray:
        """Lengths of the original texts in UTF-8 bytes. int64 [documents]."""
        return self.column("text_bytes").astype(np.int64)

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self._columns:
            parts = [pq.read_table(self._document_file(shard), columns=[name]) for shard in range(len(self._shards.entries))]
            self._columns[name] = pa.concat_tables(parts)[name] if parts else pa.chunked_array([[]])
        return self._columns[name].slice(0, len(self))

    @property
    def column_names(self) -> list[str]:
        """Names of the columns of the table of documents."""
        return pq.read_schema(self._document_file(0)).names if self._shards.entries else []

    def _document_file(self, shard: int) -> pa.BufferReader:
        entry = self._shards.entries[shard]
        return pa.BufferReader(self._folder.read_checked(f"documents-{entry['name']}.parquet", entry["documents_xxh3"]))

    def verify(self) -> None:
        """Hash every file again; opening a local corpus checks only sizes, reading it only tables and compressed tokens.

        Raises:
            UserError: naming the first file that is not as it was written, and of a token file the block.
        """
        if self._folder.hash(OFFSETS) != self._offsets_xxh3:
            raise UserError(self._folder.where(OFFSETS), "missing or not as it was written", REMAKE)
        for shard in range(len(self._shards.entries)):
            self._shards.verify(shard)
            self._document_file(shard)

    def prefix(self, documents: int) -> CorpusPrefix:
        """Return the first `documents` documents; of a shuffled corpus, a uniform random subset."""
        return CorpusPrefix(self, documents)


class CorpusPrefix(Corpus):
    """The first documents of a corpus, read through it."""

    def __init__(self, whole: Corpus, documents: int) -> None:
        if not 0 < documents <= len(whole):
            raise ValueError(f"a prefix of {documents} documents does not fit a corpus of {len(whole)}")
        self.__dict__.update(whole.__dict__)
        self.offsets = whole.offsets[: documents + 1]
        self.fingerprint = hash_value([whole.fingerprint, documents])

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_prefix, (self.directory, len(self))


def _open_prefix(directory: str | Path, documents: int) -> CorpusPrefix:
    return Corpus(directory).prefix(documents)


def _read_index(folder: Folder) -> dict[str, Any]:
    where = folder.where(INDEX)
    try:
        index = parse_json(folder.read(INDEX))
    except ValueError:
        raise UserError(where, "is no JSON", REMAKE) from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        version = index.get("format") if isinstance(index, dict) else None
        raise UserError(where, f"format {version} is not {FORMAT}", "make the corpus again with this version")
    if hash_value({key: value for key, value in index.items() if key != "fingerprint"}) != index.get("fingerprint"):
        raise UserError(where, "not as it was written", REMAKE)
    return index


def _read_offsets(folder: Folder, index: dict[str, Any]) -> np.ndarray:
    """Return where documents start: a memory map of a local file, a remote one read whole and checked."""
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
