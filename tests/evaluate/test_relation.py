"""Nats of held-out partners given their own seed, another, and none: against unpacked float64, and a model of known answers."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from paired_documents import BEGIN, DOCUMENTS, QUIET, UNCAPPED, make_documents, make_vectors, run_pair, write_inputs
from sbp_kernels import PackedLayout

from sbp_fast.config import ModelConfig, RunConfig, TrainConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate import relation
from sbp_fast.evaluate.bootstrap import ratio, resample_pair_sums
from sbp_fast.evaluate.likelihood import pair_trees
from sbp_fast.evaluate.relation import measure_pairs, summarize, usable_pairs
from sbp_fast.model.saved import save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pairs.heldout_pairs import NO_SEED, HeldoutPairs
from sbp_fast.pipeline.files import read_json
from sbp_fast.pipeline.stage import run_stage
from sbp_fast.stages.relation import measure_relation
from sbp_fast.train.data.batches import NO_TARGET
from sbp_fast.train.data.pair_batches import PairBatches

VOCABULARY, CONTEXT = 300, 48
SHAPE = ModelConfig(layers=2, hidden_size=32, heads=4, kv_heads=2, head_dim=8, intermediate_size=48, context=CONTEXT)
SAMPLES = 200


def sharp_model() -> Transformer:
    """A model in float64 with predictions far from uniform: a wrong mask, position or row then shows."""
    model = Transformer(SHAPE, VOCABULARY)
    model.initialize(1)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter *= 4
    return model


def constant_model() -> Transformer:
    """A model that gives every token the same probability, whatever it reads."""
    model = Transformer(SHAPE, VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


class CountingModel(SimpleNamespace):
    """Hand-made logits: a token's probability is how often it is visible, plus one, over the visible tokens and vocabulary."""

    def __init__(self) -> None:
        super().__init__(config=SHAPE, vocabulary_size=VOCABULARY, device=torch.device("cpu"))

    def __call__(self, ids: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        queries, keys = torch.arange(len(ids))[:, None], torch.arange(len(ids))
        visible = (keys <= queries) & (queries < layout.visible_until[keys])
        return visible.double() @ torch.nn.functional.one_hot(ids, VOCABULARY).double()

    def logits(self, counts: torch.Tensor) -> torch.Tensor:
        return ((counts + 1) / (counts.sum(1, keepdim=True) + VOCABULARY)).log()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of `prepare` and `pair`; some held-out documents are longer than the model's context."""
    directory = tmp_path_factory.mktemp("relation")
    texts, ids = make_documents(2)
    write_inputs(directory, texts, ids, make_vectors(2))
    run_pair(directory, similarity_low=0.2, near_duplicate_containment=0.3, **UNCAPPED)
    return directory


@pytest.fixture(scope="module")
def prepared(directory: Path) -> PreparedCorpus:
    return PreparedCorpus(directory / "corpus")


@pytest.fixture(scope="module")
def pairs(directory: Path, prepared: PreparedCorpus) -> HeldoutPairs:
    return usable_pairs(prepared, HeldoutPairs.load(directory / "pairs"), CONTEXT)[0]


def nats_alone(model: Transformer, before: np.ndarray, partner: np.ndarray) -> float:
    """Nats of a partner's tokens after its first, by a full softmax of one unpacked sequence."""
    tokens = torch.from_numpy(np.concatenate([before, partner[1:]]).astype(np.int64))
    with torch.no_grad():
        table = model.logits(model(tokens, PackedLayout.from_lengths([len(tokens)]))).log_softmax(-1)
    return -sum(float(table[index - 1, tokens[index]]) for index in range(len(before), len(tokens)))


def test_usable_pairs_are_test_pairs_that_fit_and_have_another_seed(directory: Path, prepared: PreparedCorpus) -> None:
    everything, lengths = HeldoutPairs.load(directory / "pairs"), np.diff(prepared.heldout.offsets)
    without = np.where(everything.splits == "test", everything.other_seeds, NO_SEED)
    without[np.flatnonzero((everything.splits == "test") & (lengths[everything.partners] < CONTEXT))[:3]] = NO_SEED
    everything = replace(everything, other_seeds=without)
    usable, left_out = usable_pairs(prepared, everything, CONTEXT)
    assert set(usable.partners.tolist()) <= set(prepared.test.tolist())
    assert lengths[usable.partners].max() <= CONTEXT < lengths[everything.partners].max()
    assert (usable.other_seeds != NO_SEED).all() and left_out["without_other_seed"] >= 3 and left_out["partners_too_long"] > 0
    assert len(usable) + sum(left_out.values()) == (everything.splits == "test").sum()


@pytest.mark.parametrize("at_once", [7, 8192])
def test_nats_equal_each_partner_after_its_seed_alone_in_float64(
    at_once: int, prepared: PreparedCorpus, pairs: HeldoutPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relation, "PAIRS_AT_ONCE", at_once)
    model, corpus, partner_token = sharp_model(), prepared.heldout, [prepared.tokenizer.partner]
    table, flops = measure_pairs(model, prepared, pairs, QUIET)
    assert table.num_rows == len(pairs) > 40 and flops > 0
    assert max(len(corpus[int(seed)]) for seed in pairs.seeds) > CONTEXT  # a seed that is truncated
    for row in table.to_pylist()[::6]:
        partner = corpus[row["partner"]]
        assert row["tokens"] == len(partner) - 1
        for name in ("own", "other"):
            seed = corpus[row["seed" if name == "own" else "other_seed"]][:CONTEXT]
            expected = nats_alone(model, np.concatenate([seed, partner_token]), partner)
            assert row[f"nats_{name}"] == pytest.approx(expected, rel=1e-11)
        assert partner[0] == BEGIN
        assert row["nats_none"] == pytest.approx(nats_alone(model, partner[:1], partner), rel=1e-11)
    assert [table[name].to_pylist() for name in ("seed", "partner", "other_seed")] == [
        values.tolist() for values in (pairs.seeds, pairs.partners, pairs.other_seeds)
    ]


def test_model_that_counts_what_it_sees_gives_the_nats_counted_by_hand(prepared: PreparedCorpus, pairs: HeldoutPairs) -> None:
    model: Any = CountingModel()
    table, _ = measure_pairs(model, prepared, pairs, QUIET)

    def counted(before: list[int], partner: list[int]) -> float:
        nats, seen = 0.0, list(before)
        for token in partner[1:]:
            nats -= math.log((seen.count(token) + 1) / (len(seen) + VOCABULARY))
            seen.append(token)
        return nats

    for row in table.to_pylist()[::5]:
        seed, other, partner = (prepared.heldout[row[name]].tolist() for name in ("seed", "other_seed", "partner"))
        separator = prepared.tokenizer.partner
        assert row["nats_own"] == pytest.approx(counted([*seed[:CONTEXT], separator], partner), rel=1e-9)
        assert row["nats_other"] == pytest.approx(counted([*other[:CONTEXT], separator], partner), rel=1e-9)
        assert row["nats_none"] == pytest.approx(counted(partner[:1], partner), rel=1e-9)


def test_pair_trees_hold_the_tokens_and_targets_of_the_synthesizers_batches(
    prepared: PreparedCorpus, pairs: HeldoutPairs
) -> None:
    tokens = 4 * CONTEXT
    chosen: Any = SimpleNamespace(seeds=pairs.seeds, partners=pairs.partners)
    recipe = TrainConfig(tokens=150 * tokens, tokens_per_step=tokens, microbatch_tokens=tokens)
    batches = PairBatches(prepared.heldout, chosen, prepared.tokenizer.partner, recipe, CONTEXT, seed=0)
    trained = set()
    for step in range(batches.steps):
        batch = batches.sequence(step, 0)
        assert batch.layout.lengths is not None
        parts = (tensor.split(batch.layout.lengths) for tensor in (batch.tokens, batch.targets))
        root: list[int] = []
        for ids, targets in ((segment.tolist(), own.tolist()) for segment, own in zip(*parts, strict=True)):
            if ids[0] != prepared.tokenizer.partner:
                assert set(targets) == {NO_TARGET}
                root = ids
            else:
                trained.add((tuple(root), tuple(ids), tuple(targets[:-1])))
                assert targets[-1] == NO_TARGET
    measured = set()
    for tree in pair_trees(prepared.heldout, pairs.seeds, pairs.partners, prepared.tokenizer.partner, CONTEXT):
        first = len(tree.segments[0])
        for segment in tree.segments[1:]:
            targets = tree.targets[first - len(tree.segments[0]) :][: len(segment)].tolist()
            measured.add((tuple(tree.segments[0].tolist()), (*segment.tolist(), targets[-1]), tuple(targets)))
            first += len(segment)
    assert measured == trained and len(measured) > 40


def test_pair_trees_repeat_a_seed_whose_partners_exceed_a_packed_sequence(
    prepared: PreparedCorpus, pairs: HeldoutPairs
) -> None:
    trees = pair_trees(prepared.heldout, pairs.seeds, pairs.partners, 2, CONTEXT, packed_tokens=100)
    assert len(trees) > len(np.unique(pairs.seeds)) and all(len(tree) <= 100 or len(tree.segments) == 2 for tree in trees)
    assert sorted({int(owner) for tree in trees for owner in tree.owners}) == list(range(len(pairs)))


def test_constant_model_explains_nothing_of_any_partner(prepared: PreparedCorpus, pairs: HeldoutPairs) -> None:
    table, _ = measure_pairs(constant_model(), prepared, pairs, QUIET)
    summary = summarize(table, 0.95, 0, SAMPLES)
    for interval in summary["nats"].values():
        assert all(interval[key] == pytest.approx(math.log(VOCABULARY), rel=1e-6) for key in ("value", "low", "high"))
    for interval in summary["gain"].values():
        assert max(abs(value) for value in interval.values()) < 1e-6


def scores(random: np.random.Generator, documents: int, gain: float, by_document: float, by_pair: float) -> pa.Table:
    """Pairs of a document with its eight successors: a gain of which each document, as seed and as partner, has its share."""
    seeds = np.repeat(np.arange(documents), 8)
    partners = (seeds + np.tile(np.arange(1, 9), documents)) % documents
    as_seed, as_partner = by_document * random.standard_normal((2, documents))
    tokens = random.integers(20, 200, documents)[partners]
    each = gain + as_seed[seeds] + as_partner[partners] + by_pair * random.standard_normal(len(seeds))
    own = 3.0 * tokens
    columns = {"seed": seeds, "partner": partners, "other_seed": seeds, "tokens": tokens}
    return pa.table(columns | {"nats_own": own, "nats_other": own + each * tokens, "nats_none": own + 2 * each * tokens})


@pytest.mark.parametrize(("by_document", "by_pair"), [(0.3, 0.1), (0.3, 0.6)])
def test_interval_covers_the_true_gain_though_pairs_share_documents(by_document: float, by_pair: float) -> None:
    """95% intervals of 200 repetitions, in which seeds and partners have effects of their own (3 sigma: 0.05)."""
    random, covered = np.random.default_rng(0), 0
    for repetition in range(200):
        interval = summarize(scores(random, 60, 0.1, by_document, by_pair), 0.95, repetition, SAMPLES)["gain"]["other"]
        covered += interval["low"] <= 0.1 <= interval["high"]
    assert covered / 200 > 0.9


def test_resample_pair_sums_weighs_a_pair_by_both_its_documents() -> None:
    first, second = np.array([5, 5, 9, 7]), np.array([7, 9, 5, 5])
    columns = np.array([[1.0, 0], [100, 0], [100, 0], [1, 0]])
    sums = resample_pair_sums(columns, first, second, 400, seed=0)
    assert sums.shape == (400, 2)
    counts = {(total % 200 // 2, total // 200) for total in sums[:, 0].astype(int).tolist()}  # of 5 with 7, and with 9
    assert counts == {(a * b, a * c) for a in range(4) for b in range(4 - a) for c in [3 - a - b]}


def test_summary_has_ratios_of_sums_and_paired_differences() -> None:
    table = scores(np.random.default_rng(1), 40, 0.2, 0.1, 0.1)
    summary = summarize(table, 0.95, 0, SAMPLES)
    tokens = table["tokens"].to_numpy()
    for name in ("own", "other", "none"):
        assert summary["nats"][name]["value"] == pytest.approx(table[f"nats_{name}"].to_numpy().sum() / tokens.sum())
    for name in ("other", "none"):
        difference = summary["nats"][name]["value"] - summary["nats"]["own"]["value"]
        gain = summary["gain"][name]
        assert gain["value"] == pytest.approx(difference) and gain["low"] < gain["value"] < gain["high"]
    assert (summary["pairs"], summary["partners"], summary["documents"]) == (320, 40, 40)
    assert summary["tokens"] == tokens.sum() and ratio(np.array([1.0, 2.0])) == [0.5]


def test_fewer_than_twenty_pairs_give_no_rates() -> None:
    table = scores(np.random.default_rng(1), 40, 0.2, 0.1, 0.1)
    assert summarize(table.slice(0, 20), 0.95, 0, SAMPLES)["gain"] is not None
    for few in (0, 19):
        summary = summarize(table.slice(0, few), 0.95, 0, SAMPLES)
        assert (summary["pairs"], summary["nats"], summary["gain"]) == (few, None, None)


def write_model(model: Transformer, directory: Path, corpus: Path) -> Path:
    run_stage(
        "train",
        directory,
        config={},
        inputs={"corpus": corpus},
        body=lambda context: save_model(model, context.directory),
        console=QUIET,
    )
    return directory


def test_stage_writes_a_row_for_each_pair_and_the_counts(directory: Path, pairs: HeldoutPairs, tmp_path: Path) -> None:
    model = write_model(sharp_model().float(), tmp_path / "model", directory / "corpus")
    config = RunConfig(device="cpu", threads=1)
    inputs = {"corpus": directory / "corpus", "pairs": directory / "pairs", "model": model}
    manifest = measure_relation(config, tmp_path / "relation", **inputs, console=QUIET)
    table = pq.read_table(tmp_path / "relation/relation.parquet")
    assert table.column_names == ["seed", "partner", "other_seed", "tokens", "nats_own", "nats_other", "nats_none"]
    assert table.num_rows == len(pairs) == manifest.counts["pairs"]
    assert manifest.counts == summarize(table, 0.95, 0) | {
        name: manifest.counts[name] for name in ("partners_too_long", "without_other_seed")
    }
    assert manifest.flops > 0 and manifest.counts["partners_too_long"] > 0
    assert read_json(tmp_path / "relation/manifest.json")["config"]["compare"]["confidence"] == 0.95


def test_stage_refuses_pairs_of_another_corpus_and_models_that_do_not_fit(directory: Path, tmp_path: Path) -> None:
    corpus, config = directory / "corpus", RunConfig(device="cpu", threads=1)
    texts, ids = make_documents(1)
    write_inputs(tmp_path / "other", texts, ids, make_vectors(1))
    fitting = write_model(constant_model(), tmp_path / "model", corpus)
    with pytest.raises(UserError, match=r"was not made from .*; give the output of pair on it"):
        out, pairs = tmp_path / "out", directory / "pairs"
        measure_relation(config, out, corpus=tmp_path / "other/corpus", pairs=pairs, model=fitting, console=QUIET)
    larger = write_model(Transformer(SHAPE, VOCABULARY + 1), tmp_path / "larger", corpus)
    with pytest.raises(UserError, match="has a vocabulary of 301, the corpus one of 300"):
        measure_relation(config, tmp_path / "out", corpus=corpus, pairs=directory / "pairs", model=larger, console=QUIET)
    broken = constant_model()
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    nonsense = write_model(broken, tmp_path / "broken", corpus)
    with pytest.raises(UserError, match="gives likelihoods that are not finite"):
        measure_relation(config, tmp_path / "out", corpus=corpus, pairs=directory / "pairs", model=nonsense, console=QUIET)
    assert DOCUMENTS == 60 and not (tmp_path / "out").exists()
