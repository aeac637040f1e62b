"""One run with an arm, a metric, a filter rule, a reader, a kNN backend, an optimizer and a quality rate from outside."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import SETTINGS, TOPICS, make_documents
from torch import nn
from typer.testing import CliRunner

from sbp_fast.cli import app
from sbp_fast.config import FilterConfig, ModelConfig, PairConfig, RunConfig, TrainConfig
from sbp_fast.config.files import load_config
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.readers import READERS, Fields, InputFile, Reader, Record, register_reader
from sbp_fast.evaluate.metrics import METRICS, Items, Metric, bits_per_byte, score_rows
from sbp_fast.evaluate.quality import rate
from sbp_fast.evaluate.quality_rates import QUALITY_RATES, Measured, QualityRate
from sbp_fast.experiment.plan.tables import stage_costs
from sbp_fast.experiment.run import run
from sbp_fast.filters.features import Features
from sbp_fast.filters.rules import FILTER_RULES, Judgement, filter_rule
from sbp_fast.model.flops import parameters
from sbp_fast.neighbors.backends import BACKENDS, KnnBackend
from sbp_fast.neighbors.searcher import KnnSearcher
from sbp_fast.pipeline.progress import Console
from sbp_fast.train.memory import optimizer_bytes
from sbp_fast.train.optimizer import OPTIMIZERS, OptimizerEntry, Optimizers

ARM = """
[arms.decayed]
recipe.weight_decay = 1.0
"""
OWN_SETTINGS = (
    *SETTINGS,
    "name='extended'",
    "pair.backend='sorted'",
    "pretrain.optimizer='momentum'",
)


@dataclass(frozen=True)
class Experiment:
    """A finished run with its configuration file and its results."""

    config: RunConfig
    settings: list[str]
    directory: Path
    results: dict[str, Any]

    @property
    def page(self) -> str:
        return (self.directory / "report.html").read_text(encoding="utf-8")


class TabReader(Reader):
    """Reads lines of an id, a tab and a text."""

    suffixes = (".tabs",)

    def read(self, file: InputFile, fields: Fields) -> Iterator[Record]:
        with file.open() as stream:
            for number, line in enumerate(stream.read().decode().splitlines(), 1):
                id, text = line.split("\t")
                yield Record({fields.id: id, fields.text: text}, number)


class SortedSearcher(KnnSearcher):
    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def search(self, rows: np.ndarray, k: int, search_budget: int = 0, task: Any = None) -> tuple[np.ndarray, np.ndarray]:
        scores = self.vectors[rows] @ self.vectors.T
        scores[np.arange(len(rows)), rows] = -np.inf
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return ids, np.take_along_axis(scores, ids, axis=1)


class SortedBackend(KnnBackend):
    """Sorts all products."""

    exact, uses_device = True, False

    def open(self, vectors: np.ndarray, ids: np.ndarray, config: PairConfig, **options: Any) -> KnnSearcher:
        return SortedSearcher(vectors)

    def core_seconds(self, documents: float, dimension: int) -> float:
        return 1234.0


def make_momentum(model: nn.Module, recipe: TrainConfig) -> Optimizers:
    options = {"lr": recipe.learning_rate, "momentum": 0.9, "weight_decay": recipe.weight_decay}
    return [torch.optim.SGD(model.parameters(), **options)]


def momentum_bytes(config: ModelConfig, vocabulary_size: int) -> int:
    return 4 * parameters(config, vocabulary_size)


def longest_of_shard(features: Features, config: FilterConfig) -> Judgement:
    """Reject the document of each shard with the most tokens."""
    return features.tokens, np.arange(len(features.tokens)) == np.argmax(features.tokens)


def nats_per_token(config: RunConfig, prepared: PreparedCorpus, console: Console) -> list[Metric]:
    (bits,) = bits_per_byte(config, prepared, console)

    def items(prepared: PreparedCorpus, context: int) -> Items:
        heldout, test = prepared.heldout, prepared.test
        ids, sources, lengths = heldout.ids[test], heldout.sources[test], np.diff(heldout.offsets)[test] - 1
        to_rows = lambda nats: score_rows("nats_per_token", ids, sources, -nats, lengths)  # noqa: E731
        return replace(bits.items(prepared, context), to_rows=to_rows)

    return [Metric("nats_per_token", "Nats per token", "lower", "documents", 2, items)]


def brief(measured: Measured) -> dict[str, Any]:
    short = np.array([len(document) < 20 for document in measured.samples.generated])
    return rate(short, "generated documents below 20 tokens")


@pytest.fixture(scope="module")
def _registered() -> Iterator[None]:
    register_reader(TabReader())
    BACKENDS.register("sorted", SortedBackend())
    OPTIMIZERS.register("momentum", OptimizerEntry(make_momentum, momentum_bytes))
    filter_rule("longest_of_shard", threshold=1, description="the most tokens of its shard")(longest_of_shard)
    METRICS.register("nats_per_token", nats_per_token)
    QUALITY_RATES.register("brief", QualityRate("Brief documents", brief))
    yield
    READERS.unregister(".tabs")
    BACKENDS.unregister("sorted")
    OPTIMIZERS.unregister("momentum")
    FILTER_RULES.unregister("longest_of_shard")
    METRICS.unregister("nats_per_token")
    QUALITY_RATES.unregister("brief")


@pytest.fixture(scope="module")
def experiment(_registered: None, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("extension")
    lines = [f"{id}\t{text}" for id, text in make_documents().items()]
    (folder / "documents.tabs").write_text("\n".join(lines), encoding="utf-8")
    (folder / "arm.toml").write_text(ARM, encoding="utf-8")
    files, overrides = ["small", folder / "arm.toml"], [f"corpus.path='{folder / 'documents.tabs'}'", *OWN_SETTINGS]
    config = load_config(files, overrides)
    run(config, folder / "run", console=Console(quiet=True))
    results = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    return Experiment(config, [*map(str, files), *overrides], folder / "run", results)


def test_reader_of_a_made_up_suffix_reads_the_documents(experiment: Experiment) -> None:
    prepared = PreparedCorpus(experiment.directory / "prepare")
    assert {id.partition("-")[0] for id in prepared.unique.ids} == set(TOPICS)


def test_arm_of_a_toml_table_is_trained_scored_and_shown(experiment: Experiment) -> None:
    arm = experiment.results["arms"]["decayed"]
    assert list(experiment.results["arms"]) == ["baseline", "sbp", "decayed"]
    assert arm["label"] == "Decayed" and arm["final_loss"] != experiment.results["arms"]["baseline"]["final_loss"]
    assert set(arm["difference_to_baseline"]) == set(experiment.results["metrics"])
    assert (experiment.directory / "train/decayed").is_dir() and (experiment.directory / "evaluate/decayed").is_dir()
    ledger = {line["stage"]: line["arms"] for line in experiment.results["ledger"]}
    assert ledger["train/decayed"] == ["decayed"] and ledger["evaluate/decayed"] == ["decayed"]
    assert experiment.page.count(">Decayed<") >= 7  # columns, ledger, and the axes and legends of plots


def test_metric_stands_in_scores_differences_and_the_page(experiment: Experiment) -> None:
    assert experiment.results["metrics"]["nats_per_token"]["label"] == "Nats per token"
    assert all(arm["nats_per_token"]["value"] > 0 for arm in experiment.results["arms"].values())
    assert "Nats per token" in experiment.page


def test_filter_rule_rejects_and_stands_in_the_counts_and_the_page(experiment: Experiment) -> None:
    counts = experiment.results["sources"]["related"]["synthetic_quality"]["rules"]["longest_of_shard"]
    assert counts["rejected"] >= 1 and counts["description"] == "the most tokens of its shard"
    assert "<strong>longest of shard</strong>" in experiment.page


def test_quality_rate_is_measured_and_stands_in_the_page(experiment: Experiment) -> None:
    brief = experiment.results["sources"]["related"]["synthetic_quality"]["quality"]["brief"]
    assert brief["label"] == "Brief documents" and 0 <= brief["rate"] <= 1
    assert "Brief documents" in experiment.page


def test_knn_backend_finds_the_pairs_and_is_named(experiment: Experiment) -> None:
    assert (
        experiment.results["sources"]["related"]["pairs"]["self_join"]["backend"] == "sorted"
        and experiment.results["sources"]["related"]["pairs"]["pairs"] > 0
    )


def test_optimizer_trains_the_arms_and_is_recorded(experiment: Experiment) -> None:
    assert experiment.results["run"]["config"]["pretrain"]["optimizer"] == "momentum"
    assert experiment.results["arms"]["baseline"]["final_loss"] > 0


def test_plan_counts_the_arm_the_optimizer_and_the_backend(experiment: Experiment) -> None:
    costs = stage_costs(experiment.config)
    assert costs["train/decayed"].flops == costs["train/baseline"].flops > 0 and "evaluate/decayed" in costs
    assert costs["pair/related"].core_seconds > 1234.0
    assert optimizer_bytes(experiment.config.model, 300, "momentum") == 4 * parameters(experiment.config.model, 300)
    shown = CliRunner().invoke(app, ["plan", *experiment.settings], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "train/decayed" in shown.output


def test_help_of_train_says_that_an_arm_may_be_a_users_own() -> None:
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "[arms.NAME]" in shown.output
