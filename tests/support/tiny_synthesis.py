"""A corpus and a synthesizer for the tests of the stage `synthesize`."""

import sys
from pathlib import Path

import pytest
import torch
from overrides import overridden
from tiny_training import QUIET, SETTINGS, configure, make_corpus, make_stage

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.generate.engine import GenerationResult
from sbp_fast.generate.journal import Journal
from sbp_fast.model.saved import save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.stages.synthesize import synthesize

OVERRIDES = ("synthesize={samples_per_seed=3, shard_seeds=5, batch_documents=16, top_p=0.95, repeated_tokens=4}",)
TOKENS = "pretrain.tokens=3584"


def make_inputs(directory: Path, **changes: int) -> dict[str, Path]:
    """Return the directories of a small corpus and of a synthesizer with random weights, its shape changed perhaps."""
    corpus = make_corpus(directory)
    shape = configure(directory).model.model_copy(update={"context": 30, **changes})
    model = Transformer(shape, PreparedCorpus(corpus).tokenizer.vocabulary_size)
    model.initialize(0)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(20)
    make_stage("train", corpus, directory / "model", lambda work: save_model(model, work.directory))
    return {"directory": directory, "corpus": corpus, "model": directory / "model"}


def settings(directory: Path, *overrides: str) -> RunConfig:
    """Return the configuration of these tests."""
    return configure(directory, *OVERRIDES, TOKENS, *overrides)


class Killed(BaseException):
    """An exception in place of a SIGKILL: nothing in the program catches it."""


def run(inputs: dict[str, Path], out: Path, *overrides: str) -> Manifest:
    """Run the stage in this process."""
    config = settings(inputs["directory"], *overrides)
    manifest = synthesize(config, out, corpus=inputs["corpus"], model=inputs["model"], console=QUIET)
    assert manifest is not None
    return manifest


def record_generated(monkeypatch: pytest.MonkeyPatch, kill_at: int = 0) -> list[tuple[int, int]]:
    """Return a list that grows by the seed and sample of each document saved; `Killed` is raised after `kill_at` of them."""
    generated: list[tuple[int, int]] = []
    add = Journal.add

    def record(journal: Journal, result: GenerationResult) -> None:
        add(journal, result)
        generated.append((result.seed, result.sample))
        if len(generated) == kill_at:
            raise Killed

    monkeypatch.setattr(Journal, "add", record)
    return generated


def command(inputs: dict[str, Path], out: Path, *overrides: str) -> list[str]:
    """Return arguments of `sbp-fast` that mean the same as `settings`."""
    directory = inputs["directory"]
    values = [
        str(directory / "empty.toml"),
        f"corpus.path={directory}/documents.jsonl",
        *overridden(overridden(SETTINGS, *OVERRIDES, TOKENS), *overrides),
    ]
    return ["synthesize", *values, "--corpus", str(inputs["corpus"]), "--model", str(inputs["model"]), "--out", str(out)]


def documents(directory: Path) -> list[tuple[object, ...]]:
    """Return all columns of each document, and its tokens."""
    written = Corpus(directory)
    return [(*row.values(), written[i].tolist()) for i, row in enumerate(written.documents.to_pylist())]


def make_python(path: Path, site: Path = Path(__file__).parent / "stand_in") -> Path:
    """Return a Python that finds the packages in `site`, by default one with a stand-in for vLLM."""
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path
