"""A finished run made of invented numbers and a few short documents, in the shape that the stages write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.config import CorpusConfig, ModelConfig, RunConfig, dump_config
from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.corpus.shards import CorpusWriter
from sbp_fast.corpus.tokenizer import Tokenizer, train_tokenizer
from sbp_fast.pairs.pairset import write_pairs
from sbp_fast.progress import Console
from sbp_fast.stage import Manifest, Work, run_stage

QUIET = Console(quiet=True)
CONFIG = RunConfig(
    name="fabricated",
    seed=3,
    threads=1,
    corpus=CorpusConfig(vocabulary_size=400),
    model=ModelConfig(layers=2, width=32, heads=2, key_value_heads=1, head_width=16, feed_forward_width=48, context=64),
)
HOSTILE = '</script><script>alert("hostile")</script><img src=x onerror=alert(1)> & so on'
WORDS = "the ships of our navy sailed in the spring and came home with the trade of many lands before winter fell".split()


def sentences(seed: int, count: int = 6) -> str:
    """Invented prose, different for each seed."""
    generator = np.random.default_rng(seed)
    return " ".join(" ".join(generator.choice(WORDS, 9)).capitalize() + "." for _ in range(count))


def write_stage(directory: Path, stage: str, body: Callable[[Work], None], flops: float = 0.0, **counts: Any) -> Manifest:
    """A finished stage whose manifest says `counts`."""

    def record(work: Work) -> None:
        work.flops = flops
        work.record(**counts)
        body(work)

    return run_stage(stage, directory, config={}, inputs={}, body=record, console=QUIET)


def write_corpus(directory: Path, config: RunConfig = CONFIG, train: int = 40, heldout: int = 12) -> PreparedCorpus:
    """A prepared corpus of invented prose in two sources, a fifth of it the unique part."""
    texts = [sentences(seed) for seed in range(train + heldout)]
    tokenizer = train_tokenizer(texts, config.corpus.vocabulary_size)

    def body(work: Work) -> None:
        tokenizer.save(work.directory / "tokenizer.json")
        _write_documents(work.directory / "train", tokenizer, texts[:train], "train")
        _write_documents(work.directory / "heldout", tokenizer, texts[train:], "heldout")

    unique = train // 5
    lengths = [len(tokenizer.encode(text)) + 2 for text in texts]
    run_stage(
        "prepare",
        directory,
        config={"corpus": config.corpus.model_dump(mode="json")},
        inputs={},
        console=QUIET,
        body=lambda work: (
            body(work),
            work.record(
                documents=train,
                tokens=sum(lengths[:train]),
                text_bytes=sum(len(text) for text in texts[:train]),
                unique_documents=unique,
                unique_tokens=sum(lengths[:unique]),
                heldout_documents=heldout,
                vocabulary_size=tokenizer.vocabulary_size,
                bytes_per_token=2.5,
                sources={"even": train // 2, "odd": train // 2},
                embedded=False,
                passages_cut=0,
            ),
        )[0],
    )
    return PreparedCorpus(directory)


def _write_documents(directory: Path, tokenizer: Tokenizer, texts: list[str], name: str, **columns: list[Any]) -> None:
    writer = CorpusWriter(directory, tokenizer.vocabulary_size)
    for index, text in enumerate(texts):
        tokens = [tokenizer.begin, *tokenizer.encode(text), tokenizer.end]
        row = {key: values[index] for key, values in columns.items()}
        source = "synthetic" if columns else ("even", "odd")[index % 2]
        writer.add(tokens, id=f"{name}/{index}", source=source, text_bytes=len(text.encode()), **row)
    writer.close()
