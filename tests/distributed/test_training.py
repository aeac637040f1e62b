"""Several processes train as one does, stop, go on as another number of them, in another mesh."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from overrides import overridden
from tiny_training import QUIET, SETTINGS, configure, make_corpus, train_arm

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.model.saved import load_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.launcher import run_in_processes
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.stages.train import train
from sbp_fast.train.data.corpus_batches import CorpusBatches
from sbp_fast.train.data.validation_sets import document_set
from sbp_fast.train.loop import train_step
from sbp_fast.train.optimizer import make_optimizers
from sbp_fast.train.schedules import learning_rate
from sbp_fast.train.task import TrainTask

CHANGES = ("pretrain={tokens=5120, tokens_per_step=512, microbatch_tokens=128}", "checkpoint.seconds=1000", "device=cpu")
CHANGES += ("validation={points=5, tokens=128, samples=2}",)
STEPS = 10


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and models that one process and two have trained on it without a break."""
    home = tmp_path_factory.mktemp("distributed")
    make_corpus(home)
    train_arm(configure(home, *CHANGES), home / "one", corpus=home / "corpus")
    sbp_fast(home, home / "two", processes=2)
    return home


def sbp_fast(home: Path, out: Path, *overrides: str, processes: int, stop_after: int | None = None) -> str:
    """Train by the command line, and what it printed; with `stop_after` under torchrun, until one process hears SIGTERM."""
    settings = [
        str(home / "empty.toml"),
        f"corpus.path={home}/documents.jsonl",
        *overridden(overridden(SETTINGS, *CHANGES), *overrides),
    ]
    command = ["train", *settings, "--corpus", str(home / "corpus"), "--out", str(out)]
    if stop_after is None:
        launcher = [sys.executable, "-m", "sbp_fast", *command, "--gpus", str(processes), "--verbose"]
    else:
        script = Path(__file__).parents[1] / "support" / "stopping.py"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launcher = [*torchrun, str(script), str(stop_after), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode == 0) == (stop_after is None), done.stdout + done.stderr
    if stop_after is not None:
        assert f"stopped after {stop_after + 1} steps, which are saved: the same command resumes from here" in done.stdout
        assert "exitcode  : 143" in done.stderr
    return done.stdout


def metrics(directory: Path, *keys: str) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in keys) for line in lines if all(key in line for key in keys)]


READ = ("step", "train/tokens", "data/digest", "data/valid_share", "data/loss_share", "train/lr")


def exact_losses(home: Path) -> list[float]:
    """The same training in float64."""
    config = configure(home, *CHANGES)
    prepared = PreparedCorpus(home / "corpus")
    batches = CorpusBatches(prepared.unique, None, TrainTask.of_arm(config, "baseline"), config.model.context)
    model = Transformer(config.model, prepared.tokenizer.vocabulary_size)
    model.initialize(config.seed)
    model.double()
    optimizers, losses = make_optimizers(model, config.pretrain), []
    for step in range(batches.steps):
        sequences = (batches.sequence(step, index) for index in range(4))
        rate = learning_rate(config.pretrain, step, batches.steps)
        losses.append(train_step(model, sequences, 4, optimizers, config.pretrain, rate)[0].item())
    return losses


def check_losses(home: Path, directory: Path) -> None:
    """The error of the losses against float64 is at most twice that of one process's."""
    exact = torch.tensor(exact_losses(home), dtype=torch.float64)
    alone, mine = (torch.tensor(metrics(path, "train/loss"), dtype=torch.float64)[:, 0] for path in (home / "one", directory))
    assert len(mine) == STEPS and mine[-1] < mine[0]
    errors = [(losses - exact).square().mean().sqrt() for losses in (alone, mine)]
    assert errors[1] <= 2 * max(errors[0], torch.finfo(torch.float32).eps * exact.max())


def check_validation(home: Path, directory: Path) -> None:
    """The held-out losses are those of one process to rounding, at the same points, and samples were written at each."""
    alone, mine = (metrics(path, "step", "train/tokens", "validation/loss") for path in (home / "one", directory))
    assert [point[:2] for point in mine] == [point[:2] for point in alone] and [point[0] for point in mine] == [1, 3, 5, 7, 9]
    assert [point[2] for point in mine] == pytest.approx([point[2] for point in alone], rel=1e-5)
    written = [json.loads(line)["step"] for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert written == [1, 1, 3, 3, 5, 5, 7, 7, 9, 9]


def weights(directory: Path) -> bytes:
    return (directory / "weights.safetensors").read_bytes()


def test_two_processes_train_the_model_of_one(home: Path) -> None:
    assert metrics(home / "two", *READ) == metrics(home / "one", *READ)
    check_losses(home, home / "two")
    check_validation(home, home / "two")
    prepared = PreparedCorpus(home / "corpus")
    measured = document_set(prepared.heldout, prepared.validation, limit=128, capacity=128, context=96)
    assert len(measured.sequences) % 2 == 1  # so that one of two processes repeats a sequence
    one, two = (Manifest.load(home / name, "train") for name in ("one", "two"))
    assert one.counts["processes"] == 1 and two.counts["processes"] == 2
    assert one.flops == two.flops and one.counts["sources"] == two.counts["sources"]
    assert [p.shape for p in load_model(home / "two").parameters()] == [p.shape for p in load_model(home / "one").parameters()]


def test_stopped_run_resumes_to_the_same_bits_or_with_other_numbers_of_processes(home: Path, tmp_path: Path) -> None:
    sbp_fast(home, tmp_path / "two", processes=2, stop_after=3)
    shutil.copytree(tmp_path / "two.partial", tmp_path / "elastic.partial")
    assert "going on from step-00000004" in sbp_fast(home, tmp_path / "two", processes=2)
    assert weights(tmp_path / "two") == weights(home / "two")
    assert metrics(tmp_path / "two", *READ, "train/loss", "train/grad_norm") == metrics(
        home / "two", *READ, "train/loss", "train/grad_norm"
    )
    # two processes, then one, then four in a mesh of two by two, which compute activations again and gather weights once
    config = configure(home, *CHANGES, "checkpoint.keep_every_steps=6")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sbp_fast.stages.train.Training", stopped_after(6))
        with pytest.raises(KeyboardInterrupt):
            train_arm(config, tmp_path / "elastic", corpus=home / "corpus")
    mesh = ("parallel={shard_processes=2, activation_checkpointing='selective', gather_once=true}",)
    printed = sbp_fast(home, tmp_path / "elastic", *mesh, processes=4)
    assert "going on from step-00000006" in printed and "4 process(es)" in printed
    assert metrics(tmp_path / "elastic", *READ) == metrics(home / "one", *READ)
    check_losses(home, tmp_path / "elastic")
    check_validation(home, tmp_path / "elastic")


@pytest.mark.slow
def test_two_processes_train_the_same_bits_with_and_without_validation(home: Path, tmp_path: Path) -> None:
    sbp_fast(home, tmp_path / "never", "validation.points=0", processes=2)
    assert weights(tmp_path / "never") == weights(home / "two")


def test_two_processes_stop_early_and_select_the_best_point(home: Path, tmp_path: Path) -> None:
    """At a learning rate that changes nothing, so that the first point stays the best."""
    still = "tokens=5120, tokens_per_step=512, microbatch_tokens=128, learning_rate=1e-30, weight_decay=0.0"
    printed = sbp_fast(home, tmp_path / "out", f"pretrain={{{still}, select='best', patience=2}}", processes=2)
    losses = [loss for _, loss in metrics(tmp_path / "out", "step", "validation/loss")]
    counts = Manifest.load(tmp_path / "out").counts
    assert len(losses) == 3 and len(set(losses)) == 1 and counts["validation_loss"] == losses[0]
    assert (counts["steps"], counts["selected_step"]) == (6, 2)
    assert "stopped after 6 steps: no lower held-out loss in 2 points" in printed


def stopped_after(steps: int) -> type:
    """A training that is cut off in the step after `steps`."""
    from sbp_fast.train.loop import Training

    class Stopping(Training):
        def step(self, step: int, prefetch: object) -> None:
            if step == steps:
                raise KeyboardInterrupt
            super().step(step, prefetch)  # type: ignore[arg-type]

    return Stopping


@pytest.mark.slow
def test_train_function_in_two_processes_gives_the_model_of_the_command(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(home, *CHANGES)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = {"console": QUIET, "corpus": home / "corpus"}
    task = TrainTask.of_arm(config, "baseline")
    run_in_processes(train, config, task, tmp_path / "two", gpus=2, **given)
    assert weights(tmp_path / "two") == weights(home / "two")
    with pytest.raises(SystemExit, match="2"):  # 4 packed sequences a step
        run_in_processes(train, config, task, tmp_path / "three", gpus=3, **given)


def test_indivisible_processes_are_refused_in_one_line(home: Path, tmp_path: Path) -> None:
    settings = [str(home / "empty.toml"), f"corpus.path={home}/documents.jsonl", *overridden(SETTINGS, *CHANGES)]
    command = [sys.executable, "-m", "sbp_fast", "train", *settings, "--corpus", str(home / "corpus")]
    command += ["--out", str(tmp_path / "three"), "--gpus", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [
        "error: microbatch_tokens: 4 packed sequences a step for 3 processes; lower it, or take a number of processes that "
        "divides the sequences"
    ]
    assert not (tmp_path / "three").exists()
