"""A run small enough for a test, with every stage real."""

from pathlib import Path

import pytest

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.experiment.run import run
from sbp_fast.pipeline.progress import Console

TINY = (
    "name='tiny'",
    "threads=1",
    "corpus.maximum_documents=150",
    "corpus.unique_share=0.3",
    "corpus.vocabulary_size=512",
    "embed.maximum_tokens=16",
    "embed.shard_documents=64",
    "pair.similarity_low=0.4",
    "model.layers=1",
    "model.hidden_size=32",
    "model.heads=1",
    "model.kv_heads=1",
    "model.intermediate_size=64",
    "model.context=256",
    "corpus.passage_characters=240",
    "pretrain.tokens=40960",
    "pretrain.tokens_per_step=2048",
    "pretrain.microbatch_tokens=512",
    "pretrain.optimizer=adamw",  # so small a base model that tuning it shows
    "pretrain.learning_rate=3e-3",
    "validation.points=3",
    "validation.tokens=2048",
    "checkpoint.seconds=0.5",
    "synthesizer.tokens=20480",
    "synthesizer.tokens_per_step=2048",
    "synthesizer.microbatch_tokens=1024",
    "synthesize.shard_seeds=32",
    "filter.keep_unfinished=true",
    "quality.judged_documents=20",
)


@pytest.fixture(scope="session")
def tiny_config() -> RunConfig:
    return load_config(["small"], TINY)


@pytest.fixture(scope="session")
def tiny_run(tiny_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of one finished run; tests read it and leave it as it is."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run(tiny_config, out, console=Console(quiet=True))
    return out
