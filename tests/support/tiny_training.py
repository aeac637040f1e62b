"""A corpus, pairs and a configuration small enough to train on in a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.pairs.pairset import write_pairs
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage
from sbp_fast.stages.prepare import prepare
from sbp_fast.stages.train import train
from sbp_fast.train.task import TrainTask

QUIET = Console(quiet=True)
WORDS = ("the", "a", "cat", "dog", "tree", "house", "sees", "eats", "climbs", "near", "under", "small", "red", "of", "river")
SETTINGS = (
    "threads=1",
    "corpus.vocabulary_size=300",
    "corpus.unique_share=0.5",
    "model={layers=1, hidden_size=16, heads=2, kv_heads=1, head_dim=8, intermediate_size=24, context=96}",
    "pretrain={tokens=3072, tokens_per_step=256, microbatch_tokens=128}",
    "synthesizer={tokens=2048, tokens_per_step=256, microbatch_tokens=256, learning_rate=1e-3}",
    "checkpoint.seconds=0",
    "validation={points=3, tokens=150, samples=1}",
)


def configure(directory: Path, *overrides: str) -> RunConfig:
    (directory / "empty.toml").touch()
    return load_config([directory / "empty.toml"], [f"corpus.path={directory}/documents.jsonl", *SETTINGS, *overrides])


def train_arm(config: RunConfig, out: Path, arm: str = "baseline", **inputs: Any) -> Manifest:
    """Train an arm, or with `arm="synthesizer"` the synthesizer, alone and in this process."""
    task = TrainTask.of_synthesizer(config) if arm == "synthesizer" else TrainTask.of_arm(config, arm)
    manifest = train(config, task, out, console=QUIET, **inputs)
    assert manifest is not None
    return manifest


def make_corpus(directory: Path, *overrides: str) -> Path:
    """Prepare 96 documents of random words, half of them unique."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, random.integers(10, 60))) for _ in range(96)]
    records = [json.dumps({"id": f"d{number}", "text": text}) for number, text in enumerate(texts)]
    (directory / "documents.jsonl").write_text("\n".join(records))
    prepare(configure(directory, *overrides), directory / "corpus", console=QUIET)
    return directory / "corpus"


def make_pairs(corpus: Path, out: Path) -> Path:
    """Write pairs of every third document with the two that follow it."""
    seeds = np.arange(0, len(PreparedCorpus(corpus).unique) - 2, 3).repeat(2)
    partners = seeds + np.tile([2, 1], len(seeds) // 2)
    return make_stage("pair", corpus, out, lambda work: write_pairs(work.directory, [(seeds, partners, partners / 100)]))


def make_synthetic(corpus: Path, out: Path, documents: int = 40) -> Path:
    """Write documents that no real one equals."""

    def body(work: StageContext) -> None:
        write_documents(work.directory, [np.arange(start, start + 40) for start in range(documents)])

    return make_stage("filter", corpus, out, body)


def write_documents(directory: Path, documents: list[np.ndarray], vocabulary_size: int = 300) -> Corpus:
    writer = CorpusWriter(directory, vocabulary_size, shard_tokens=100)
    for number, tokens in enumerate(documents):
        writer.add(tokens, id=f"{directory.name}/{number}", source="test", text_bytes=1)
    return writer.close()


def make_stage(name: str, corpus: Path, out: Path, body: Callable[[StageContext], None]) -> Path:
    run_stage(name, out, config={}, inputs={"corpus": corpus}, body=body, console=QUIET)
    return out
