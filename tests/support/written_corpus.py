"""Hand-made synthetic documents in the format of the stage `synthesize`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tiny_training import make_stage

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.pipeline.stage import StageContext

Row = tuple[int, Sequence[int], str]


def fresh_tokens(random: np.random.Generator, tokens: int) -> list[int]:
    """Return tokens in an order that no real document has."""
    return random.integers(35, 95, tokens).tolist()  # printable ASCII in the tokenizer of `make_corpus`


def make_written(corpus: Path, out: Path, rows: Sequence[Row], shard_tokens: int = 60) -> Path:
    """Return the finished output of `synthesize` with documents of (seed, tokens, stop), in small shards."""
    tokenizer = PreparedCorpus(corpus).tokenizer

    def body(work: StageContext) -> None:
        writer = CorpusWriter(work.directory, tokenizer.vocabulary_size, shard_tokens)
        for number, (seed, tokens, stop) in enumerate(rows):
            text = tokenizer.decode(tokens)
            columns = {"id": f"synthetic/{seed}/{number}", "source": "synthetic", "text_bytes": len(text.encode())}
            stored = [tokenizer.begin, *tokens, tokenizer.end]
            writer.add(stored, **columns, seed=seed, sample=number, stop=stop, mean_log_probability=-1 - number / 10)
        writer.close()

    return make_stage("synthesize", corpus, out, body)
