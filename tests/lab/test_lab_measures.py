"""The lab's metric and gates, with models and samples whose figures are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sbp_fast.config import ModelConfig, RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.data.tokenizer import join_ids
from sbp_fast.evaluate.metrics import all_metrics
from sbp_fast.evaluate.scoring import score_model
from sbp_fast.lab.files import corpus_settings, write_world
from sbp_fast.lab.gates import conditional_loss, gate_sentence, sample_figures
from sbp_fast.lab.metrics import EXCESS, EXCESS_LINKED, read_corpus, value_tree
from sbp_fast.lab.worlds import FACTS, GENRES, JOINED, Documents, World, WorldSettings
from sbp_fast.model.transformer import Transformer
from sbp_fast.pairs.heldout_pairs import HeldoutPairs
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.pair import pair
from sbp_fast.stages.prepare import prepare

QUIET = Console(quiet=True)
WORLD = World(WorldSettings(concepts=24, oracle_ratio=2, noise=0.2))
MODEL = ModelConfig(layers=1, hidden_size=16, heads=1, kv_heads=1, head_dim=16, intermediate_size=16, context=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    write_world(WORLD, folder / "world")
    prepare(configuration(folder), folder / "prepare", console=QUIET)
    pair(configuration(folder), folder / "prepare", None, folder / "pair", console=QUIET)
    return folder


def configuration(folder: Path) -> RunConfig:
    settings = {"threads": 1, "evaluate": {"continuation_questions": 0}, **corpus_settings(folder / "world")}
    return RunConfig.model_validate(settings)


def ignorant_model(prepared: PreparedCorpus) -> Transformer:
    """A model whose every prediction is uniform over the vocabulary."""
    model = Transformer(MODEL, prepared.tokenizer.vocabulary_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def test_excess_of_a_uniform_model_is_its_nats_less_those_of_the_truth(folder: Path) -> None:
    prepared = PreparedCorpus(folder / "prepare")
    metrics = all_metrics(configuration(folder), prepared, QUIET)
    table, _ = score_model(ignorant_model(prepared), prepared, metrics, QUIET, "uniform")
    told = read_corpus(WORLD, prepared, prepared.heldout)
    for name, linked in ((EXCESS, False), (EXCESS_LINKED, True)):
        rows = [row for row in table.to_pylist() if row["metric"] == name]
        chosen = (told.genres == JOINED) & (WORLD.linked[told.concepts] == linked)
        assert len(rows) == chosen.sum() > 0 and {row["source"] for row in rows} == {"J1"}
        excess = sum(row["numerator"] for row in rows) / sum(row["denominator"] for row in rows)
        exact = -np.log(WORLD.probabilities(told)[chosen]).mean()
        assert excess == pytest.approx(math.log(prepared.tokenizer.vocabulary_size) - exact, rel=1e-6)


def test_value_trees_score_the_values_alone_after_what_precedes() -> None:
    document, seed = np.arange(10, 19), np.arange(30, 39)
    tree = value_tree(document, 7, [seed])
    tokens = np.concatenate(tree.segments)
    assert tree.parents == [-1, 0] and tree.owners.tolist() == [7] * FACTS
    assert tree.targets.tolist() == [14, 15, 16, 17] and (tokens[tree.rows] + 1).tolist() == tree.targets.tolist()


def test_the_exact_conditional_loss_is_about_its_expectation_and_below_a_uniform_model(folder: Path) -> None:
    prepared = PreparedCorpus(folder / "prepare")
    figures = conditional_loss(WORLD, ignorant_model(prepared), prepared, HeldoutPairs.load(folder / "pair"))
    unlinked = int((~WORLD.linked).sum())
    assert figures["pairs"] == unlinked * 2 * 2  # two held-out documents of B1 and two of J1
    assert figures["conditional"] == pytest.approx(math.log(prepared.tokenizer.vocabulary_size), rel=1e-6)
    assert figures["exact"] == pytest.approx(WORLD.expected_loss(1), abs=0.3)
    assert figures["entropy"] < figures["exact"] < figures["uniform"]


def write_samples(folder: Path, prepared: PreparedCorpus, texts: list[str], seeds: list[int]) -> Corpus:
    writer = CorpusWriter(folder, prepared.tokenizer.vocabulary_size)
    tokens, lengths = prepared.tokenizer.enclose(*join_ids(prepared.tokenizer.encode_batch(texts)))
    ids = [str(number) for number in range(len(texts))]
    writer.add_batch(tokens, lengths, ids=ids, sources=ids, text_bytes=[1] * len(texts), seed=seeds)
    writer.close()
    return Corpus(folder)


def test_shares_of_samples_are_counted(folder: Path, tmp_path: Path) -> None:
    prepared = PreparedCorpus(folder / "prepare")
    told = read_corpus(WORLD, prepared, prepared.unique)
    seeds = np.flatnonzero(~WORLD.linked[told.concepts] & (told.genres == GENRES.index("B1")))[:4]
    concepts, joined = told.concepts[seeds], np.full(4, JOINED)
    true = WORLD.facts(Documents(concepts, joined, np.zeros((4, FACTS), np.int64)))
    true[0, 0] = (true[0, 0] + 1) % 8
    concepts[1] = concepts[0]
    true[1] = WORLD.facts(Documents(concepts, joined, true))[1]
    texts = [*WORLD.texts(Documents(concepts, joined, true)), prepared.text(prepared.unique, int(seeds[0])), "J1 a"]
    owners = [*seeds.tolist(), int(seeds[0]), 0]
    figures = sample_figures(WORLD, prepared, write_samples(tmp_path / "samples", prepared, texts, owners))
    assert figures == {
        "documents": 6,
        "well_formed": 5 / 6,
        "kept_name": 4 / 5,
        "missing_kind": 4 / 5,
        "missing_kept_name": 3 / 4,
        "missing_right_values": 15 / 16,
        "chance": 1 / 8,
    }
    alone = sample_figures(WORLD, prepared, write_samples(tmp_path / "alone", prepared, texts, [-1] * 6))
    assert alone == figures | {"kept_name": None, "missing_kept_name": None}


def test_gate_sentence_has_the_figures_of_synthesizer_and_samples() -> None:
    samples = {"kept_name": 0.98, "missing_right_values": 0.63, "chance": 0.125}
    conditional = {"conditional": 0.51, "exact": 0.48}
    assert gate_sentence("related", conditional, samples) == (
        "gate of related: conditional loss 0.510 nats a value (exact 0.480), name kept in 98.0%, "
        "63.0% of the missing kind's values right (12.5% by chance)"
    )
    unseeded = {"kept_name": None, "missing_right_values": None, "chance": 0.125}
    assert gate_sentence("unconditional", None, unseeded) == "gate of unconditional: no sample of the missing kind"
