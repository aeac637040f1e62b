"""Small corpora of given documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from sbp_fast.data.token_shards.blocks import Compression
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.writer import CorpusWriter

DOCUMENTS = st.lists(st.lists(st.integers(0, 65_535), max_size=30), min_size=1, max_size=25)
MODES: tuple[Compression, ...] = ("none", "zstd")


def write(directory: Path, documents: list[Any], shard_tokens: int, vocabulary: int = 65_536, **storage: Any) -> Corpus:
    writer = CorpusWriter(directory, vocabulary, shard_tokens, **storage)
    for number, tokens in enumerate(documents):
        writer.add(tokens, id=f"d/{number}", source="ab"[number % 2], text_bytes=3 * len(tokens), seed=number * 10)
    return writer.close()
