"""Token shards: what `prepare` writes, and the immutable `Corpus` that everything else reads.

A corpus is a directory: `index.json`, raw little-endian token files `tokens-00000.bin` that can be memory-mapped, and
beside each a `documents-00000.parquet` with one row a document. The format is described in docs/data-format.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.errors import UserError
from sbp_fast.files import atomic_open, atomic_path, hash_file, hash_value, read_json, write_json

FORMAT = 1
INDEX = "index.json"
REMAKE = "it is damaged: make the corpus again"


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


class Corpus:
    """Documents as token ids: `corpus[i]` is document i, its <begin> and <end> tokens included.

    Attributes:
        offsets: int64 [documents + 1], where each document starts in the stream of all tokens.
        ids, sources: str arrays [documents].
        text_bytes: int64 [documents], length of the original text in UTF-8 bytes.
        fingerprint: hash of content alone (tokens, ids, order), not of paths or shard sizes' names.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / INDEX).is_file():
            raise UserError(self.directory, "holds no token shards", "make it with `sbp-fast prepare`")
        index = _read_index(self.directory / INDEX)
        self._shards: list[dict[str, Any]] = index["shards"]
        self.vocabulary_size: int = index["vocabulary_size"]
        self.fingerprint: str = index["fingerprint"]
        self.dtype = token_dtype(self.vocabulary_size)
        self._tokens = [self._map(f"tokens-{shard['name']}.bin", shard["tokens"]) for shard in self._shards]
        self._shard_starts = np.cumsum([0] + [len(tokens) for tokens in self._tokens])
        tables = [pq.read_table(self._checked_documents(shard)) for shard in self._shards]
        self.documents: pa.Table = pa.concat_tables(tables) if tables else pa.table({})
        lengths = self.documents["tokens"].to_numpy().astype(np.int64) if tables else np.zeros(0, np.int64)
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    def _map(self, name: str, tokens: int) -> np.ndarray:
        path = self.directory / name
        if not path.is_file() or path.stat().st_size != tokens * self.dtype.itemsize:
            raise UserError(path, "missing or not of the recorded size", REMAKE)
        # a plain array over the map: slices of numpy's own class take five times as long
        return np.asarray(np.memmap(path, self.dtype, "r")) if tokens else np.zeros(0, self.dtype)

    def _checked_documents(self, shard: dict[str, Any]) -> Path:
        return _check(self.directory / f"documents-{shard['name']}.parquet", shard["documents_xxh3"])

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
        """Tokens [start, stop) of the stream of all documents; a view unless it crosses a shard's end."""
        first = int(np.searchsorted(self._shard_starts, start, "right")) - 1
        parts = []
        for shard in range(max(first, 0), len(self._tokens)):
            low = int(self._shard_starts[shard])
            if low >= stop:
                break
            parts.append(self._tokens[shard][max(start - low, 0) : stop - low])
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def column(self, name: str) -> np.ndarray:
        """One column of the document table as a numpy array [documents]."""
        return self.documents[name].to_numpy(zero_copy_only=False)

    @property
    def ids(self) -> np.ndarray:
        return self.column("id")

    @property
    def sources(self) -> np.ndarray:
        return self.column("source")

    @property
    def text_bytes(self) -> np.ndarray:
        return self.column("text_bytes").astype(np.int64)

    def verify(self) -> None:
        """Hash every file again; opening a corpus checks the documents, but of the tokens only their number.

        Raises:
            UserError: naming the first file that is not as it was written.
        """
        for shard in self._shards:
            self._checked_documents(shard)
            _check(self.directory / f"tokens-{shard['name']}.bin", shard["tokens_xxh3"])

    def prefix(self, documents: int) -> CorpusPrefix:
        """The first `documents` documents; of a shuffled corpus, a uniform random subset."""
        return CorpusPrefix(self, documents)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = read_json(path)
    except ValueError:
        raise UserError(path, "is no JSON", REMAKE) from None
    if index.get("format") != FORMAT:
        raise UserError(path, f"format {index.get('format')} is not {FORMAT}", "make the corpus again with this version")
    if hash_value({key: value for key, value in index.items() if key != "fingerprint"}) != index.get("fingerprint"):
        raise UserError(path, "not as it was written", REMAKE)
    return index


def _check(path: Path, recorded: str) -> Path:
    if not path.is_file() or hash_file(path) != recorded:
        raise UserError(path, "missing or not as it was written", REMAKE)
    return path


class CorpusPrefix(Corpus):
    """The head of a corpus, read through it."""

    def __init__(self, whole: Corpus, documents: int) -> None:
        if not 0 < documents <= len(whole):
            raise ValueError(f"a prefix of {documents} documents does not fit a corpus of {len(whole)}")
        self.__dict__.update(whole.__dict__)
        self.documents = whole.documents.slice(0, documents)
        self.offsets = whole.offsets[: documents + 1]
        self.fingerprint = hash_value([whole.fingerprint, documents])


class CorpusWriter:
    """Writes a corpus shard by shard; each finished shard is whole on disk, the index comes last."""

    def __init__(self, directory: Path, vocabulary_size: int, shard_tokens: int = 1 << 24) -> None:
        self.directory, self.vocabulary_size, self.shard_tokens = Path(directory), vocabulary_size, shard_tokens
        self.directory.mkdir(parents=True, exist_ok=True)
        self.dtype = token_dtype(vocabulary_size)
        self.shards: list[dict[str, Any]] = []
        self._documents: list[np.ndarray] = []
        self._rows: list[dict[str, Any]] = []
        self._held = 0

    def add(self, tokens: np.ndarray | Sequence[int], *, id: str, source: str, text_bytes: int, **columns: Any) -> None:
        """Append a document (with its <begin> and <end>); `columns` go to its row of the table, the same for all."""
        ids = np.asarray(tokens, dtype=self.dtype)
        self._documents.append(ids)
        self._rows.append({"id": id, "source": source, "text_bytes": text_bytes, "tokens": len(ids), **columns})
        self._held += len(ids)
        if self._held >= self.shard_tokens:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        name = f"{len(self.shards):05d}"
        tokens = self.directory / f"tokens-{name}.bin"
        table = self.directory / f"documents-{name}.parquet"
        with atomic_open(tokens) as file:
            for document in self._documents:
                file.write(document.tobytes())
        with atomic_path(table) as temporary:
            pq.write_table(pa.Table.from_pylist(self._rows), temporary)
        hashes = {"tokens_xxh3": hash_file(tokens), "documents_xxh3": hash_file(table)}
        self.shards.append({"name": name, "tokens": self._held, "documents": len(self._rows), **hashes})
        self._documents, self._rows, self._held = [], [], 0

    def close(self) -> Corpus:
        """Finish the last shard, write the index and open the corpus."""
        self._flush()
        index = {
            "format": FORMAT,
            "vocabulary_size": self.vocabulary_size,
            "dtype": self.dtype.str,
            "shards": self.shards,
        }
        write_json(self.directory / INDEX, {**index, "fingerprint": hash_value(index)})
        return Corpus(self.directory)
