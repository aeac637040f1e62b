"""Held-out loss during training, and the choice of weights by it."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import configure, make_corpus, make_pairs, make_stage, train_arm

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.likelihood import document_trees, log_likelihoods
from sbp_fast.model.saved import load_model
from sbp_fast.pairs.heldout_pairs import NO_SEED, HeldoutPairs
from sbp_fast.pairs.pairset import write_pairs
from sbp_fast.pipeline.interrupts import Stopped
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.stage import StageContext
from sbp_fast.train import loop
from sbp_fast.train.checkpoint import CHECKPOINTS, MARKER
from sbp_fast.train.validation import Validation, best_point, points_since_best

WEIGHTS = "weights.safetensors"
BEST = ("pretrain.select='best'",)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a corpus and a base model."""
    home = tmp_path_factory.mktemp("validation")
    train_arm(configure(home), home / "base", corpus=make_corpus(home))
    return home


def run(home: Path, out: Path, *overrides: str) -> Manifest:
    return train_arm(configure(home, *overrides), out, corpus=home / "corpus")


def lines(directory: Path, key: str = "validation/loss") -> list[dict[str, Any]]:
    read = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line for line in read if key in line]


def samples(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]


def fake_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float | None]) -> None:
    """Let point number n of a run, which has as many as there are losses, measure losses[n]."""

    def loss(validation: Validation, model: object, *_: object) -> float | None:
        assert validation.points == len(losses)
        return losses[len(validation_points)]

    validation_points: list[int] = []
    real = loop.Training.validate

    def validate(training: loop.Training, step: int, log: object) -> None:
        validation_points[:] = [steps for steps, _ in training.totals.validations]
        real(training, step, log)  # type: ignore[arg-type]

    monkeypatch.setattr(Validation, "loss", loss)
    monkeypatch.setattr(loop.Training, "validate", validate)


@given(st.integers(0, 20), st.integers(1, 100))
def test_points_are_evenly_spaced_and_the_last_is_at_the_end(points: int, total: int) -> None:
    steps = sorted(Validation(points).steps(total))
    assert len(steps) == min(points, total)
    if points:
        assert steps[-1] == total and steps[0] >= 1
        gaps = np.diff([0, *steps])
        assert gaps.max() - gaps.min() <= 1


def test_best_point_is_the_first_of_the_lowest_finite_losses() -> None:
    history = [(2, 3.0), (4, None), (6, 2.0), (8, 2.0), (10, 2.5), (12, None)]
    assert best_point(history) == (6, 2.0) and points_since_best(history) == 3
    assert best_point([(2, None)]) is None and points_since_best([(2, None)]) == 1 and points_since_best([]) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_are_the_same_bits_with_and_without_validation(home: Path, tmp_path: Path, optimizer: str) -> None:
    settings = (f"pretrain.optimizer={optimizer}", "checkpoint.seconds=1000")
    often = run(home, tmp_path / "often", *settings, "validation={points=12, tokens=2000, samples=3}")
    never = run(home, tmp_path / "never", *settings, "validation.points=0")
    assert (tmp_path / "often" / WEIGHTS).read_bytes() == (tmp_path / "never" / WEIGHTS).read_bytes()
    assert often.fingerprint == never.fingerprint  # neither makes the other's output stale
    assert len(lines(tmp_path / "often")) == 12 and lines(tmp_path / "never") == samples(tmp_path / "never") == []
    assert often.flops == never.flops and "validation_loss" not in never.counts
    figures = [
        [(line["step"], line["train/loss"], line["data/digest"]) for line in lines(tmp_path / name, "train/loss")]
        for name in ("often", "never")
    ]
    assert figures[0] == figures[1]


def test_last_validation_loss_is_that_of_the_saved_model_on_the_first_validation_documents(home: Path) -> None:
    prepared, model = PreparedCorpus(home / "corpus"), load_model(home / "base")
    sizes = np.diff(prepared.heldout.offsets)[prepared.validation]
    documents = prepared.validation[: np.searchsorted(np.cumsum(sizes), 150, "right")]
    assert 2 <= len(documents) < len(prepared.validation)
    trees = document_trees([prepared.heldout[index] for index in documents], model.config.context)
    nats, extent = log_likelihoods(model, trees, len(documents))
    (*_, last), counts = lines(home / "base"), Manifest.load(home / "base").counts
    assert last["validation/loss"] == pytest.approx(-nats.sum() / extent.predictions, rel=1e-6)
    text_bytes = prepared.heldout.text_bytes[documents].sum()
    assert last["validation/bits_per_byte"] == pytest.approx(-nats.sum() / math.log(2) / text_bytes, rel=1e-6)
    assert counts["validation_loss"] == counts["last_validation_loss"] == last["validation/loss"]
    assert counts["selected_step"] == counts["steps"] and counts["validation_tokens"] == extent.predictions
    assert [line["step"] for line in lines(home / "base")] == [3, 7, 11]
    assert [line["train/tokens"] for line in lines(home / "base")] == [1024, 2048, 3072]


def test_samples_of_an_arm_follow_no_seed_and_those_of_a_later_point_differ(home: Path) -> None:
    written = samples(home / "base")
    assert [sample["step"] for sample in written] == [3, 7, 11]
    assert all(sample["seed"] is None and sample["stop"] for sample in written)
    assert len({sample["text"] for sample in written}) > 1


def before_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Call `act` before the step with this number, from 0, of the next attempt."""
    real_step, steps = loop.train_step, iter(range(100))

    def step(*given: Any, **options: Any) -> Any:
        if next(steps) == number:
            act()
        return real_step(*given, **options)

    monkeypatch.setattr(loop, "train_step", step)


def interrupt() -> None:
    raise KeyboardInterrupt


def checkpoints(directory: Path) -> list[Path]:
    return sorted(path.parent for path in (directory / CHECKPOINTS).glob(f"*/{MARKER}"))


LOSSES = [4.0, 2.0, 3.0, None, 3.5, 2.5]
SIX_POINTS = ("checkpoint.seconds=1000", "checkpoint.keep=1", "validation.points=6", *BEST)


def test_output_is_the_weights_of_the_best_point(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_losses(monkeypatch, LOSSES)
    counts = run(home, tmp_path / "whole", *SIX_POINTS).counts
    assert (counts["selected_step"], counts["steps"]) == (4, 12)
    assert (counts["validation_loss"], counts["last_validation_loss"]) == (2.0, 2.5)
    selected = dict(load_model(tmp_path / "whole").named_parameters())
    before_step(monkeypatch, 4, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(home, tmp_path / "cut", *SIX_POINTS)
    (checkpoint,) = checkpoints(tmp_path / "cut.partial")
    after_four_steps = {"model": {name: torch.empty_like(value) for name, value in selected.items()}}
    dcp.load(after_four_steps, checkpoint_id=checkpoint, no_dist=True)
    assert all(torch.equal(value, selected[name]) for name, value in after_four_steps["model"].items())


def test_best_point_survives_a_stop_between_it_and_the_end(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_losses(monkeypatch, LOSSES)
    whole = run(home, tmp_path / "whole", *SIX_POINTS)
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 9, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped after 10 steps"):
            run(home, tmp_path / "broken", *SIX_POINTS)
    saved = [path.name for path in checkpoints(tmp_path / "broken.partial")]
    assert saved == ["step-00000004", "step-00000010"]  # the selected one, and the newest
    broken = run(home, tmp_path / "broken", *SIX_POINTS)
    assert broken.fingerprint == whole.fingerprint and broken.counts["selected_step"] == 4
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    assert samples(tmp_path / "broken") == samples(tmp_path / "whole")


@pytest.mark.parametrize("killed_at", [3, 7, 11])
def test_killed_run_ends_with_the_points_samples_and_weights_of_an_unbroken_one(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    settings = ("validation.points=4", *BEST)
    whole = run(home, tmp_path / "whole", *settings)
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, killed_at, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(home, tmp_path / "broken", *settings)
    with open(tmp_path / "broken.partial" / "samples.jsonl", "a") as file:
        file.write('{"step": 11, "seed": null, "text": "of a later step}')  # as if killed while it wrote
    broken = run(home, tmp_path / "broken", *settings)
    assert broken.fingerprint == whole.fingerprint
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    assert samples(tmp_path / "broken") == samples(tmp_path / "whole")
    losses = [line["validation/loss"] for line in lines(tmp_path / "whole")]
    assert len(losses) == 4 and whole.counts["validation_loss"] == min(losses)


def test_missing_checkpoint_of_the_selected_weights_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_losses(monkeypatch, [2.0, 3.0, 4.0])
    monkeypatch.setattr("sbp_fast.train.checkpoint.Checkpoints._superseded", lambda own: own._finished())
    with pytest.raises(UserError, match="step-00000004: the checkpoint of the selected weights is missing or damaged"):
        run(home, tmp_path / "out", "checkpoint.seconds=0", *BEST)


def test_patience_ends_the_run_after_points_without_a_lower_loss(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_losses(monkeypatch, [4.0, 3.0, 3.1, 3.0, 1.0, 1.0])
    counts = run(home, tmp_path / "out", "validation.points=6", "pretrain={select='best', patience=2}").counts
    assert (counts["steps"], counts["selected_step"], counts["tokens"]) == (8, 4, 8 * 256)
    assert counts["validation_loss"] == 3.0 and len(lines(tmp_path / "out")) == 4
    assert Manifest.load(tmp_path / "out").flops < Manifest.load(home / "base").flops
    monkeypatch.undo()
    fake_losses(monkeypatch, [4.0, 3.0, 3.1, 2.9, 1.0, 1.0])
    patient = run(home, tmp_path / "patient", "validation.points=6", "pretrain={select='best', patience=2}").counts
    assert (patient["steps"], patient["selected_step"]) == (12, 10)


def test_settings_of_validation_matter_to_a_run_that_selects_by_it_alone(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "last", "validation.tokens=200")
    assert run(home, tmp_path / "last", "validation.tokens=400")
    run(home, tmp_path / "best", "validation.tokens=200", *BEST)
    assert run(home, tmp_path / "best", "validation={tokens=200, points=3, samples=0}", *BEST)
    with pytest.raises(UserError, match=r"validation\.tokens: 200 -> 400"):
        run(home, tmp_path / "best", "validation.tokens=400", *BEST)


def make_heldout_pairs(corpus: Path, out: Path, split: str = "validation") -> Path:
    """Pairs of unique documents, and of each held-out document of a split with the next one."""
    prepared = PreparedCorpus(corpus)
    documents = prepared.validation if split == "validation" else prepared.test
    seeds = np.arange(len(prepared.unique) - 1)

    def body(work: StageContext) -> None:
        write_pairs(work.directory, [(seeds, seeds + 1, seeds / 100)])
        count = len(documents) - 1
        similarities, other_seeds = np.full(count, 0.7, np.float32), np.full(count, NO_SEED)
        pairs = HeldoutPairs(documents[:-1], documents[1:], similarities, np.array([split] * count), other_seeds)
        pairs.write(work.directory)

    return make_stage("pair", corpus, out, body)


def tune(home: Path, out: Path, pairs: Path, *overrides: str) -> Manifest:
    given = {"corpus": home / "corpus", "pairs": pairs, "start": home / "base"}
    return train_arm(configure(home, *overrides), out, "synthesizer", **given)


def test_synthesizer_is_validated_on_partners_given_their_seeds(home: Path, tmp_path: Path) -> None:
    pairs = make_heldout_pairs(home / "corpus", tmp_path / "pairs")
    counts = tune(home, tmp_path / "out", pairs, "validation.tokens=100000").counts
    prepared, model = PreparedCorpus(home / "corpus"), load_model(tmp_path / "out")
    heldout, nats, predictions = prepared.heldout, 0.0, 0
    for seed, partner in zip(prepared.validation[:-1], prepared.validation[1:], strict=True):
        if len(heldout[partner]) <= model.config.context:
            head = heldout[seed][: model.config.context].astype(np.int64)
            tail = np.concatenate([[prepared.tokenizer.partner], heldout[partner][1:]]).astype(np.int64)
            (tree,) = document_trees([np.concatenate([head, tail])], 10_000)
            own = slice(len(head), None)
            tree.rows, tree.targets, tree.owners = tree.rows[own], tree.targets[own], tree.owners[own]
            nats -= log_likelihoods(model, [tree], 1)[0][0]
            predictions += len(tree.rows)
    assert counts["validation_tokens"] == predictions > 0
    assert counts["validation_loss"] == pytest.approx(nats / predictions, rel=1e-6)
    ids = set(heldout.ids[prepared.validation])
    assert {sample["seed"] for sample in samples(tmp_path / "out")} <= ids
    best = tune(home, tmp_path / "best", pairs, "synthesizer.select='best'").counts
    losses = [line["validation/loss"] for line in lines(tmp_path / "best")]
    assert best["validation_loss"] == min(losses)


def test_synthesizer_without_pairs_of_validation_documents_has_no_held_out_loss(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = make_pairs(home / "corpus", tmp_path / "without")
    of_test = make_heldout_pairs(home / "corpus", tmp_path / "of-test", "test")
    for pairs in (without, of_test):
        out = tmp_path / f"from-{pairs.name}"
        assert "validation_loss" not in tune(home, out, pairs).counts
        assert lines(out) == [] and len(samples(out)) == 3
        with pytest.raises(UserError, match="has no pairs of validation documents to choose by"):
            tune(home, tmp_path / "best", pairs, "synthesizer.select='best'")
