import json
from pathlib import Path

import pytest
import torch
from sbp_kernels import PackedLayout
from tiny_training import QUIET, configure, make_corpus, make_pairs, make_synthetic

from sbp_fast.config import ModelConfig, TrainConfig
from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.corpus.shards import Corpus
from sbp_fast.errors import UserError
from sbp_fast.model.flops import training_flops
from sbp_fast.model.saved import load_model, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.stage import Manifest, run_stage
from sbp_fast.train import loop
from sbp_fast.train.batches import PackedBatch
from sbp_fast.train.checkpoint import CHECKPOINT
from sbp_fast.train.loop import mean_loss, train_step
from sbp_fast.train.optimizer import learning_rate, make_optimizer
from sbp_fast.train.train import train


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a corpus, a base model, pairs and synthetic documents."""
    home = tmp_path_factory.mktemp("training")
    corpus = make_corpus(home)
    make_pairs(corpus, home / "pairs")
    make_synthetic(corpus, home / "synthetic")
    train(configure(home), home / "base", role="base", corpus=corpus, console=QUIET)
    return home


def metrics(directory: Path) -> list[dict[str, float]]:
    """Lines of the metrics without the one figure of the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("perf/tokens_per_second") > 0 for line in lines)
    return lines


def one_batch() -> PackedBatch:
    tokens = torch.randint(3, 50, (60,), generator=torch.Generator().manual_seed(0)).numpy()
    targets = tokens.copy()
    targets[:-1], targets[[29, 59]] = tokens[1:], -100
    return PackedBatch.build(tokens, targets, PackedLayout.from_lengths([30, 30]))


def small_model() -> Transformer:
    model = Transformer(ModelConfig(layers=1, width=32, heads=2, head_width=16, feed_forward_width=48), 50)
    model.initialize(0)
    return model


def test_one_batch_is_learnt_by_heart() -> None:
    model, batch, recipe = small_model(), one_batch(), TrainConfig()
    optimizer = make_optimizer(model, recipe)
    losses = [train_step(model, batch, optimizer, 1e-2, recipe)[0] for _ in range(60)]
    assert losses[0] == pytest.approx(torch.tensor(50.0).log().item(), rel=0.02)  # knows nothing: even over the vocabulary
    assert losses[-1] < 0.02


def test_a_step_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, recipe = small_model(), one_batch(), TrainConfig()
    optimizer = make_optimizer(model, recipe)
    train_step(model, batch, optimizer, 1e-2, recipe)
    before = [parameter.clone() for parameter in model.parameters()]
    monkeypatch.setattr(loop, "mean_loss", lambda *given: mean_loss(*given) * float("inf"))
    assert train_step(model, batch, optimizer, 1e-2, recipe) == (None, None)
    monkeypatch.undo()
    assert all(torch.equal(was, now) for was, now in zip(before, model.parameters(), strict=True))
    assert train_step(model, batch, optimizer, 1e-2, recipe)[0] is not None


def test_a_run_that_diverges_ends_with_the_step(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = iter([False, True, False, *[True] * loop.SKIPPED_IN_A_ROW])
    monkeypatch.setattr(loop, "mean_loss", lambda *given: mean_loss(*given) * (float("nan") if next(bad) else 1))
    with pytest.raises(UserError, match="training, step 7: loss or gradient not finite 5 steps in a row"):
        train(configure(home), tmp_path / "out", role="base", corpus=home / "corpus", console=QUIET)
    lines = (tmp_path / "out.partial" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train/loss"] is None for line in lines[:3]] == [False, True, False]


def test_only_matrices_decay() -> None:
    decayed, kept = make_optimizer(small_model(), TrainConfig()).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(small_model().parameters()))


def test_the_learning_rate_warms_up_and_falls_to_its_final_share() -> None:
    recipe = TrainConfig(learning_rate=1.0, warmup_share=0.1, final_learning_rate_share=0.2)
    rates = [learning_rate(recipe, step, 101) for step in range(101)]
    assert rates[:11] == pytest.approx([*[n / 10 for n in range(1, 11)], 1.0])
    assert rates[55] == pytest.approx(0.6, abs=1e-12) and rates[-1] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    constant = recipe.model_copy(update={"schedule": "constant"})
    assert {learning_rate(constant, step, 101) for step in range(10, 101)} == {1.0}


def run_role(home: Path, out: Path, role: str, *overrides: str) -> Manifest:
    inputs = {
        "joint": {"synthetic": home / "synthetic"},
        "synthesizer": {"pairs": home / "pairs", "start": home / "base"},
    }
    config = configure(home, *overrides)
    return train(config, out, role=role, corpus=home / "corpus", console=QUIET, **inputs.get(role, {}))


@pytest.mark.parametrize("role", ["base", "joint", "synthesizer"])
def test_an_interrupted_run_ends_with_the_same_bytes_as_an_unbroken_one(
    role: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_role(home, tmp_path / "whole", role)
    assert whole.counts["steps"] >= 5
    real_step = loop.train_step
    for interrupted_at in (3, 1):  # the second attempt reaches step 2 + 1
        calls = iter(range(100))

        def step(*given, calls=calls, stop=interrupted_at):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return real_step(*given)

        monkeypatch.setattr(loop, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            run_role(home, tmp_path / "broken", role)
        assert (tmp_path / "broken.partial" / CHECKPOINT).is_file()
    monkeypatch.undo()
    with open(tmp_path / "broken.partial" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4}\n')  # as if killed after the metrics of the next checkpoint, before the checkpoint itself
    broken = run_role(home, tmp_path / "broken", role)
    assert broken.fingerprint == whole.fingerprint
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    assert without_clock(broken) == without_clock(whole) and broken.flops == whole.flops
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    assert not (tmp_path / "broken" / CHECKPOINT).exists()


def without_clock(manifest: Manifest) -> dict[str, object]:
    return {name: count for name, count in manifest.counts.items() if not name.endswith("_seconds")}


def test_the_base_run_counts_what_it_did(home: Path) -> None:
    manifest, prepared = Manifest.load(home / "base", "train"), PreparedCorpus(home / "corpus")
    counts, lines = manifest.counts, metrics(home / "base")
    assert counts["steps"] == len(lines) == round(3000 / 256)
    assert [line["step"] for line in lines] == list(range(12))
    assert counts["sources"]["real"]["tokens"] == counts["tokens"] == lines[-1]["train/tokens"]
    assert lines[-1]["train/real_epochs"] == counts["tokens"] / prepared.unique.tokens == counts["sources"]["real"]["epochs"]
    assert counts["valid_share"] == counts["loss_tokens"] / counts["tokens"]
    assert counts["attention"] == "torch"  # what auto became
    assert counts["final_loss"] == lines[-1]["train/loss"] < lines[0]["train/loss"]
    seen = (counts["tokens"], counts["visible_pairs"], counts["loss_tokens"])
    assert manifest.flops == training_flops(configure(home).model, prepared.tokenizer.vocabulary_size, *seen)
    assert not load_model(home / "base").training


def test_an_attention_that_cannot_run_here_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"attention: backend 'triton' needs CUDA tensors.*choose another, or auto"):
        run_role(home, tmp_path / "base", "base", "pretrain.attention=triton", "device=cpu")


def test_arms_take_equal_steps_and_joint_reads_each_synthetic_token_at_most_once(home: Path, tmp_path: Path) -> None:
    base = Manifest.load(home / "base").counts
    joint = run_role(home, tmp_path / "joint", "joint").counts
    oracle = run_role(home, tmp_path / "oracle", "oracle").counts
    scarce = run_role(home, tmp_path / "scarce", "joint", "joint.maximum_synthetic_share=1.0").counts
    assert base["steps"] == joint["steps"] == oracle["steps"] == scarce["steps"]
    for counts in (joint, oracle, scarce):  # the short window at a corpus's end, at most one an epoch of each source
        epochs = sum(source["epochs"] + 1 for source in counts["sources"].values()) + base["sources"]["real"]["epochs"] + 1
        assert abs(counts["tokens"] - base["tokens"]) < 64 * epochs
    assert joint["synthetic_share"]["wanted"] == 0.375
    assert joint["sources"]["synthetic"]["epochs"] < 1 == scarce["sources"]["synthetic"]["epochs"]
    assert scarce["sources"]["synthetic"]["tokens"] == Corpus(home / "synthetic").tokens
    assert scarce["synthetic_share"]["planned"] < 1
    assert oracle["sources"]["real"]["epochs"] < base["sources"]["real"]["epochs"]


def test_the_synthesizer_starts_from_the_base_weights(home: Path, tmp_path: Path) -> None:
    still = run_role(home, tmp_path / "still", "synthesizer", "synthesizer.learning_rate=1e-30", "synthesizer.weight_decay=0.0")
    weights = "weights.safetensors"
    assert (tmp_path / "still" / weights).read_bytes() == (home / "base" / weights).read_bytes()
    assert still.counts["pairs"] + still.counts["partners_too_long"] == len(PairSet(home / "pairs"))
    assert 0 < still.counts["valid_share"] < 1


def test_inputs_that_do_not_belong_together_are_refused(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    make_pairs(make_corpus(other, "seed=1"), other / "pairs")
    body = lambda work: save_model(small_model(), work.directory)  # noqa: E731
    run_stage("train", tmp_path / "small", config={}, inputs={}, body=body, console=QUIET)
    config, given = configure(home), {"role": "synthesizer", "corpus": home / "corpus", "console": QUIET}
    with pytest.raises(UserError, match="small: has a vocabulary of 50, the corpus's tokenizer 300"):
        train(config, tmp_path / "out", pairs=home / "pairs", start=tmp_path / "small", **given)
    with pytest.raises(UserError, match=r"pairs: was not made from .*corpus"):
        train(config, tmp_path / "out2", pairs=other / "pairs", start=home / "base", **given)
    with pytest.raises(ValueError, match="role base"):
        train(config, tmp_path / "out3", role="base", corpus=home / "corpus", pairs=home / "pairs", console=QUIET)
