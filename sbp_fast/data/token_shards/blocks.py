"""The token files of a corpus: blocks of 64 Ki tokens, each with its checksum, raw or as a zstd frame of its own.

Beside each token file is a table with one row a block: where the block ends in the file, and the xxh3-64 of its bytes there.
A read touches only the blocks that hold the tokens asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import xxhash
import zstandard

from sbp_fast.data.filesystem import REMAKE, Folder
from sbp_fast.data.token_shards.cache import BlockCache, open_cache
from sbp_fast.errors import UserError

Compression = Literal["none", "zstd"]
BLOCK_TOKENS = 1 << 16
TABLE = np.dtype([("end", "<u8"), ("xxh3", "<u8")])
ZSTD_LEVEL = 1  # higher levels hardly compress better and take twice as long
MAPPED_FILES = 512  # each holds a file descriptor, and a process may have 1024
CACHED_BYTES = 64 << 20


def split_blocks(parts: Iterable[np.ndarray], block_tokens: int) -> Iterator[np.ndarray]:
    """Split concatenated parts into blocks; a block that lies within a part is a view of it."""
    pending: list[np.ndarray] = []
    missing = block_tokens
    for part in parts:
        while len(part) >= missing:
            head, part = part[:missing], part[missing:]
            yield np.concatenate([*pending, head]) if pending else head
            pending, missing = [], block_tokens
        if len(part):
            pending.append(part)
            missing -= len(part)
    if pending:
        yield np.concatenate(pending)


def write_blocks(blocks: Iterable[np.ndarray], compression: Compression, file: BinaryIO) -> tuple[np.ndarray, str]:
    """Write blocks to a file.

    Returns:
        The table of the blocks, TABLE [blocks], and the xxh3-128 of the whole file as hex.
    """
    digest = xxhash.xxh3_128()
    compressor = zstandard.ZstdCompressor(ZSTD_LEVEL)
    rows: list[tuple[int, int]] = []
    end = 0
    for block in blocks:
        stored = compressor.compress(block.data) if compression == "zstd" else block.data
        file.write(stored)
        digest.update(stored)
        end += stored.nbytes if isinstance(stored, memoryview) else len(stored)
        rows.append((end, xxhash.xxh3_64_intdigest(stored)))
    return np.array(rows, TABLE), digest.hexdigest()


@dataclass(frozen=True)
class Shards:
    """The token files of a corpus, and how they are stored; `entries` are those of the corpus index."""

    folder: Folder
    entries: list[dict[str, Any]]
    dtype: np.dtype
    compression: Compression
    block_tokens: int

    def tokens_file(self, shard: int) -> str:
        """Return the name of a shard's token file."""
        return f"tokens-{self.entries[shard]['name']}.bin"

    def blocks(self, shard: int) -> int:
        """Return the number of blocks in a shard."""
        return int(-(-self.entries[shard]["tokens"] // self.block_tokens))

    def read_table(self, shard: int) -> np.ndarray:
        """Read and check the table of a shard's blocks. TABLE [blocks]."""
        entry = self.entries[shard]
        return np.frombuffer(self.folder.read_checked(f"blocks-{entry['name']}.bin", entry["blocks_xxh3"]), TABLE)

    def read_block(self, shard: int, index: int, table: np.ndarray, cache: BlockCache | None = None) -> np.ndarray:
        """Return a block by a checked ranged read, or from the cache.

        Raises:
            UserError: naming the file and the block that is not as it was written.
        """
        start, stop = int(table["end"][index - 1]) if index else 0, int(table["end"][index])
        xxh3 = int(table["xxh3"][index])
        stored = cache.read(xxh3, stop - start) if cache is not None else None
        if stored is None:
            stored = self.folder.read(self.tokens_file(shard), start, stop)
            self.check(stored, shard, index, table)
            if cache is not None:
                cache.keep(xxh3, stored)
        raw = zstandard.ZstdDecompressor().decompress(stored) if self.compression == "zstd" else stored
        return np.frombuffer(raw, self.dtype)

    def check(self, stored: bytes | memoryview, shard: int, index: int, table: np.ndarray) -> None:
        """Compare the bytes of a block with its checksum.

        Raises:
            UserError: naming the file and the block.
        """
        if xxhash.xxh3_64_intdigest(stored) != int(table["xxh3"][index]):
            first = index * self.block_tokens
            last = min(first + self.block_tokens, self.entries[shard]["tokens"]) - 1
            raise UserError(
                self.folder.where(self.tokens_file(shard)),
                f"block {index} (its tokens {first} to {last}) is not as it was written",
                REMAKE,
            )

    def check_size(self, shard: int) -> None:
        """Compare a token file's size with the recorded one.

        Raises:
            UserError: naming the file, and the block where it ends too early.
        """
        entry, name = self.entries[shard], self.tokens_file(shard)
        size = self.folder.size(name)
        if size is None:
            raise UserError(self.folder.where(name), "missing", REMAKE)
        if size != entry["bytes"]:
            cut = f", cut in block {np.searchsorted(self.read_table(shard)['end'], size, 'right')}" * (size < entry["bytes"])
            raise UserError(self.folder.where(name), f"{size} bytes long instead of {entry['bytes']}{cut}", REMAKE)

    def verify(self, shard: int) -> None:
        """Hash a shard's files again.

        Raises:
            UserError: naming the file, and of a token file the block.
        """
        self.check_size(shard)
        entry, table = self.entries[shard], self.read_table(shard)
        if self.folder.hash(self.tokens_file(shard)) != entry["tokens_xxh3"]:
            for index in range(len(table)):
                self.read_block(shard, index, table)
            raise UserError(self.folder.where(self.tokens_file(shard)), "not as it was written", REMAKE)


class TokenReader(Protocol):
    """Reads the tokens of shards."""

    def slice(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of a shard."""

    def block(self, shard: int, index: int, checked: bool) -> np.ndarray:
        """Return one block, its checksum compared if `checked`."""


def open_tokens(shards: Shards) -> TokenReader:
    """Return the reader for the location of the shards and the way they are stored."""
    return MappedTokens(shards) if shards.folder.local and shards.compression == "none" else BlockTokens(shards)


class MappedTokens:
    """Raw local tokens, as views of memory maps. Random reads are not checked: see `Corpus.read` and `verify`."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._mapped = lru_cache(MAPPED_FILES)(lambda shard: shards.folder.map(shards.tokens_file(shard), shards.dtype))
        self._table = lru_cache(MAPPED_FILES)(shards.read_table)

    def slice(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Return a view of tokens [start, stop) of a shard."""
        return self._mapped(shard)[start:stop]

    def block(self, shard: int, index: int, checked: bool) -> np.ndarray:
        """Return a view of one block, its checksum compared if `checked`."""
        start = index * self._shards.block_tokens
        tokens = self._mapped(shard)[start : start + self._shards.block_tokens]
        if checked:
            self._shards.check(tokens.data, shard, index, self._table(shard))
        return tokens


class BlockTokens:
    """Compressed or remote tokens: a block is read, checked and decompressed when first touched.

    The most recent blocks stay in memory; remote ones also on disk, where a cache is asked for (see `cache.py`).
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._cache = None if shards.folder.local else open_cache()
        self._table = lru_cache(MAPPED_FILES)(shards.read_table)
        blocks = max(1, CACHED_BYTES // (shards.block_tokens * shards.dtype.itemsize))
        self._block = lru_cache(blocks)(lambda shard, index: self.block(shard, index, True))

    def slice(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of a shard."""
        size = self._shards.block_tokens
        parts = [
            self._block(shard, index)[max(start - index * size, 0) : stop - index * size]
            for index in range(start // size, -(-stop // size))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def block(self, shard: int, index: int, checked: bool) -> np.ndarray:
        """Return one block; its checksum is always compared."""
        return self._shards.read_block(shard, index, self._table(shard), self._cache)
