"""Optimizers, schedules and trackers registered from outside the package; names that are unknown or taken."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import QUIET, configure, make_corpus
from torch import nn

from sbp_fast.config import ModelConfig, TrainConfig
from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError
from sbp_fast.experiment.run import check_registered_names
from sbp_fast.model.flops import parameters
from sbp_fast.stages.train import train
from sbp_fast.train.memory import optimizer_bytes
from sbp_fast.train.optimizer import OPTIMIZERS, OptimizerEntry, Optimizers
from sbp_fast.train.schedules import SCHEDULES
from sbp_fast.train.task import TrainTask
from sbp_fast.train.trackers import TRACKERS


def make_momentum(model: nn.Module, recipe: TrainConfig) -> Optimizers:
    return [torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, momentum=0.9)]


def momentum_bytes(config: ModelConfig, vocabulary_size: int) -> int:
    return 4 * parameters(config, vocabulary_size)


class Recorder:
    lines: list[dict[str, float]] = []  # noqa: RUF012 - one tracker of one test
    closed = False

    def __init__(self, directory: Path, name: str, config: dict[str, Any], first_step: int) -> None:
        assert first_step == 0 and name == "base" and config["pretrain"]["optimizer"] == "momentum"

    def log(self, metrics: dict[str, float], step: int) -> None:
        Recorder.lines.append({"step": step, **metrics})

    def close(self) -> None:
        Recorder.closed = True


@pytest.fixture
def _registered() -> Iterator[None]:
    OPTIMIZERS.register("momentum", OptimizerEntry(make_momentum, momentum_bytes))
    SCHEDULES.register("halved", lambda recipe, step, steps, warmup: 0.5)
    TRACKERS.register("recorder", Recorder)
    yield
    OPTIMIZERS.unregister("momentum")
    SCHEDULES.unregister("halved")
    TRACKERS.unregister("recorder")


@pytest.mark.usefixtures("_registered")
def test_optimizer_schedule_and_tracker_registered_outside_train_a_model(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    names = ("pretrain.optimizer=momentum", "pretrain.schedule=halved", "log.trackers=['recorder']")
    config = configure(tmp_path, *names, "pretrain.learning_rate=1.0")
    train(config, TrainTask.of_arm(config, "baseline"), tmp_path / "base", corpus=corpus, console=QUIET)
    lines = [json.loads(line) for line in (tmp_path / "base" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train/loss" in line]  # others hold the held-out loss
    assert [line["train/lr"] for line in lines] == [1.0] + [0.5] * 11
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert [line["train/loss"] for line in Recorder.lines if "train/loss" in line] == [
        line["train/loss"] for line in lines
    ] and Recorder.closed
    assert optimizer_bytes(config.model, 300, "momentum") == 4 * parameters(config.model, 300)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("pretrain.optimizer=adam", r"optimizer 'adam'.*is unknown; did you mean adamw\? known: adamw, muon"),
        ("synthesizer.schedule=linear", r"schedule 'linear'.*is unknown; known: cosine, constant, warmup-stable-decay"),
        ("log.trackers=['wandbb']", r"tracker 'wandbb'.*is unknown; did you mean wandb\? known: tensorboard, wandb, trackio"),
    ],
)
def test_unknown_name_in_the_configuration_is_refused_in_one_line(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_registered_names(load_config(["small"], [setting]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("registry", "name"), [(OPTIMIZERS, "muon"), (SCHEDULES, "cosine"), (TRACKERS, "wandb")])
def test_name_registered_twice_is_refused(registry: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{registry.kind} '{name}' is registered twice"):
        registry.register(name, registry[name])


def test_configuration_and_optimizer_bytes_need_no_torch() -> None:
    script = """if True:
        import sys
        from sbp_fast.config.files import load_config
        from sbp_fast.train.memory import optimizer_bytes
        config = load_config(["small"], ["pretrain.optimizer=muon", "pretrain.schedule=constant", "log.trackers=['wandb']"])
        assert optimizer_bytes(config.model, 300, config.pretrain.optimizer) > 0
        assert "torch" not in sys.modules, "torch was imported"
    """
    subprocess.run([sys.executable, "-c", script], check=True)
