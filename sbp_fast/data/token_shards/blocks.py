"""The token files of a corpus: blocks of 64 Ki tokens, each with its checksum, raw or as a zstd frame of its own.

Beside each token file lies a table with one row a block: where the block ends in the file, and the xxh3-64 of its bytes
there. Whatever is read, no more than the blocks that hold it are.
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
ZSTD_LEVEL = 1  # beyond it the ratio hardly grows, and writing takes twice as long
MAPPED_FILES = 512  # each holds a file descriptor, and a process may have 1024
CACHED_BYTES = 64 << 20


def cut_blocks(parts: Iterable[np.ndarray], block_tokens: int) -> Iterator[np.ndarray]:
    """All parts one after the other, cut anew into blocks; a block that lies within a part is a view of it."""
    held: list[np.ndarray] = []
    missing = block_tokens
    for part in parts:
        while len(part) >= missing:
            head, part = part[:missing], part[missing:]
            yield np.concatenate([*held, head]) if held else head
            held, missing = [], block_tokens
        if len(part):
            held.append(part)
            missing -= len(part)
    if held:
        yield np.concatenate(held)


def write_blocks(blocks: Iterable[np.ndarray], compression: Compression, file: BinaryIO) -> tuple[np.ndarray, str]:
    """Write the blocks; returns their table, TABLE [blocks], and the xxh3-128 of the whole file as hex."""
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
    """The token files of a corpus, and how they are stored; `facts` are their entries in the index."""

    folder: Folder
    facts: list[dict[str, Any]]
    dtype: np.dtype
    compression: Compression
    block_tokens: int

    def tokens_file(self, shard: int) -> str:
        return f"tokens-{self.facts[shard]['name']}.bin"

    def blocks(self, shard: int) -> int:
        """How many there are in a shard."""
        return int(-(-self.facts[shard]["tokens"] // self.block_tokens))

    def read_table(self, shard: int) -> np.ndarray:
        """The table of a shard's blocks, checked. TABLE [blocks]"""
        facts = self.facts[shard]
        return np.frombuffer(self.folder.read_checked(f"blocks-{facts['name']}.bin", facts["blocks_xxh3"]), TABLE)

    def read_block(self, shard: int, number: int, table: np.ndarray, cache: BlockCache | None = None) -> np.ndarray:
        """A block by a ranged read, checked, or from the cache.

        Raises:
            UserError: naming the file and the block that is not as it was written.
        """
        start, stop = int(table["end"][number - 1]) if number else 0, int(table["end"][number])
        xxh3 = int(table["xxh3"][number])
        stored = cache.read(xxh3, stop - start) if cache is not None else None
        if stored is None:
            stored = self.folder.read(self.tokens_file(shard), start, stop)
            self.check(stored, shard, number, table)
            if cache is not None:
                cache.keep(xxh3, stored)
        raw = zstandard.ZstdDecompressor().decompress(stored) if self.compression == "zstd" else stored
        return np.frombuffer(raw, self.dtype)

    def check(self, stored: bytes | memoryview, shard: int, number: int, table: np.ndarray) -> None:
        """Compare the bytes of a block with its checksum.

        Raises:
            UserError: naming the file and the block.
        """
        if xxhash.xxh3_64_intdigest(stored) != int(table["xxh3"][number]):
            first = number * self.block_tokens
            last = min(first + self.block_tokens, self.facts[shard]["tokens"]) - 1
            raise UserError(
                self.folder.where(self.tokens_file(shard)),
                f"block {number} (its tokens {first} to {last}) is not as it was written",
                REMAKE,
            )

    def check_size(self, shard: int) -> None:
        """Compare a token file's size with the recorded one.

        Raises:
            UserError: naming the file, and the block where it is cut.
        """
        facts, name = self.facts[shard], self.tokens_file(shard)
        size = self.folder.size(name)
        if size is None:
            raise UserError(self.folder.where(name), "missing", REMAKE)
        if size != facts["bytes"]:
            cut = f", cut in block {np.searchsorted(self.read_table(shard)['end'], size, 'right')}" * (size < facts["bytes"])
            raise UserError(self.folder.where(name), f"{size} bytes long instead of {facts['bytes']}{cut}", REMAKE)

    def verify(self, shard: int) -> None:
        """Hash a shard's files again.

        Raises:
            UserError: naming the file, and the block where it is one of tokens.
        """
        self.check_size(shard)
        facts, table = self.facts[shard], self.read_table(shard)
        if self.folder.hash(self.tokens_file(shard)) != facts["tokens_xxh3"]:
            for number in range(len(table)):
                self.read_block(shard, number, table)
            raise UserError(self.folder.where(self.tokens_file(shard)), "not as it was written", REMAKE)


class TokenReader(Protocol):
    """Reads the tokens of shards."""

    def slice(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a shard."""

    def block(self, shard: int, number: int, checked: bool) -> np.ndarray:
        """One block, its checksum compared if `checked`."""


def open_tokens(shards: Shards) -> TokenReader:
    """The reader that suits where the shards lie and how they are stored."""
    return MappedTokens(shards) if shards.folder.local and shards.compression == "none" else BlockTokens(shards)


class MappedTokens:
    """Raw local tokens, as views of memory maps. What is read at random is not checked: see `Corpus.read` and `verify`."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._mapped = lru_cache(MAPPED_FILES)(lambda shard: shards.folder.map(shards.tokens_file(shard), shards.dtype))
        self._table = lru_cache(MAPPED_FILES)(shards.read_table)

    def slice(self, shard: int, start: int, stop: int) -> np.ndarray:
        return self._mapped(shard)[start:stop]

    def block(self, shard: int, number: int, checked: bool) -> np.ndarray:
        start = number * self._shards.block_tokens
        tokens = self._mapped(shard)[start : start + self._shards.block_tokens]
        if checked:
            self._shards.check(tokens.data, shard, number, self._table(shard))
        return tokens


class BlockTokens:
    """Compressed or remote tokens: a block is read, checked and unpacked when first touched, and the last ones stay in memory;
    on disk, too, where they are remote and a cache is asked for (see `cache.py`)."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._cache = None if shards.folder.local else open_cache()
        self._table = lru_cache(MAPPED_FILES)(shards.read_table)
        held = max(1, CACHED_BYTES // (shards.block_tokens * shards.dtype.itemsize))
        self._block = lru_cache(held)(lambda shard, number: self.block(shard, number, True))

    def slice(self, shard: int, start: int, stop: int) -> np.ndarray:
        size = self._shards.block_tokens
        parts = [
            self._block(shard, number)[max(start - number * size, 0) : stop - number * size]
            for number in range(start // size, -(-stop // size))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def block(self, shard: int, number: int, checked: bool) -> np.ndarray:
        return self._shards.read_block(shard, number, self._table(shard), self._cache)
