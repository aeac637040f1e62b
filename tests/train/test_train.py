import json
import math
import signal
from pathlib import Path

import pytest
import torch
from products import hostile_memory
from tiny_training import QUIET, configure, make_corpus, make_pairs, make_synthetic, train_arm

from sbp_fast.config import ModelConfig, TrainConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.model.flops import training_flops
from sbp_fast.model.saved import load_model, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.files import read_json
from sbp_fast.pipeline.interrupts import Stopped
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.stage import run_stage
from sbp_fast.train import loop
from sbp_fast.train.checkpoint import CHECKPOINTS, MARKER
from sbp_fast.train.data.batches import PackedBatch
from sbp_fast.train.loop import is_spike, train_step
from sbp_fast.train.optimizer import Optimizers, make_optimizers
from sbp_fast.train.schedules import learning_rate


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a corpus, a base model, pairs and synthetic documents."""
    home = tmp_path_factory.mktemp("training")
    corpus = make_corpus(home)
    make_pairs(corpus, home / "pairs")
    make_synthetic(corpus, home / "synthetic")
    train_arm(configure(home), home / "base", corpus=corpus)
    return home


def metrics(directory: Path) -> list[dict[str, float]]:
    """Lines of the metrics of steps without the figures of the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train/loss" in line]
    assert all(line["perf/tokens_per_second"] > 0 and line["perf/step_seconds"] > 0 for line in lines)
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def validations(directory: Path) -> list[dict[str, float]]:
    """Lines of the validation points."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation/loss" in line]


def one_batch() -> PackedBatch:
    tokens = torch.randint(3, 50, (60,), generator=torch.Generator().manual_seed(0)).numpy()
    targets = tokens.copy()
    targets[:-1], targets[[29, 59]] = tokens[1:], -100
    return PackedBatch.build(tokens, targets, [30, 30], length=64)


def small_model() -> Transformer:
    model = Transformer(ModelConfig(layers=1, hidden_size=32, heads=2, head_dim=16, intermediate_size=48), 50)
    model.initialize(0)
    return model


def take_step(model: Transformer, optimizers: Optimizers, rate: float = 1e-2, sequences: int = 1) -> tuple[float, float]:
    loss, norm, counts = train_step(model, iter([one_batch()] * sequences), sequences, optimizers, TrainConfig(), rate)
    assert (counts.loss_tokens, counts.tokens) == (58 * sequences, 64 * sequences)
    return loss.item(), norm.item()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_repeated_steps_on_one_batch_memorise_it(optimizer: str) -> None:
    model = small_model()
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer))
    losses = [take_step(model, optimizers)[0] for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(50), rel=0.02)  # knows nothing: even over the vocabulary
    assert losses[-1] < 0.02


def test_bfloat16_training_on_the_cpu_stays_finite_for_50_steps_in_hostile_memory() -> None:
    """Where products read what lies beside their operands, and memory that nothing has written is NaN."""
    model = small_model().bfloat16()
    optimizers = make_optimizers(model, TrainConfig())
    with hostile_memory():
        figures = [take_step(model, optimizers) for _ in range(50)]
    assert all(math.isfinite(loss) and math.isfinite(norm) for loss, norm in figures)
    assert figures[-1][0] < figures[0][0] / 4
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_loss_of_a_step_is_the_mean_over_its_packed_sequences() -> None:
    once, twice = small_model(), small_model()
    figures = [take_step(model, make_optimizers(model, TrainConfig()), sequences=n) for model, n in ((once, 1), (twice, 2))]
    assert figures[0] == figures[1]  # twice a number is exact
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(once.parameters(), twice.parameters(), strict=True))


def test_gradient_of_a_step_is_that_of_the_clipped_mean_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = small_model(), one_batch()
    exact = small_model().double()
    loss = exact(batch.tokens, batch.layout, batch.targets) / 58
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in exact.parameters()]).norm()
    seen: dict[str, torch.Tensor] = {}

    def look(*_: object) -> None:
        seen.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    recipe = TrainConfig(gradient_clip=0.1)
    mine = train_step(model, iter([batch]), 1, make_optimizers(model, recipe), recipe, 1e-2)
    plain = small_model()
    torch_loss = torch.nn.functional.cross_entropy(plain.logits(plain(batch.tokens, batch.layout)), batch.targets)
    assert abs(mine[0].item() - loss.item()) <= 2 * max(abs(torch_loss.item() - loss.item()), 2**-22)
    torch_loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    assert norm > 0.1 and mine[1].item() == pytest.approx(norm.item(), rel=1e-6)
    for (name, theirs), right in zip(plain.named_parameters(), exact.parameters(), strict=True):
        value = right.grad * (0.1 / norm)
        error, theirs_error = ((x.double() - value).norm() for x in (seen[name], theirs.grad))
        assert error <= 2 * max(theirs_error, 2**-24 * value.norm())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer))
    take_step(model, optimizers)
    before = [parameter.clone() for parameter in model.parameters()]
    state = [{key: torch.clone(value) for key, value in s.items()} for o in optimizers for s in o.state.values()]
    spoil(monkeypatch, lambda: float("inf"))
    assert not all(map(math.isfinite, take_step(model, optimizers)))
    monkeypatch.undo()
    assert all(torch.equal(was, now) for was, now in zip(before, model.parameters(), strict=True))
    after = [s for o in optimizers for s in o.state.values()]
    assert all(torch.equal(was[key], now[key]) for was, now in zip(state, after, strict=True) for key in was)
    assert math.isfinite(take_step(model, optimizers)[0])


def spoil(monkeypatch: pytest.MonkeyPatch, factor: object) -> None:
    """Multiply the loss by what `factor` returns; give the run no validation points, which would take factors too."""
    forward = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda *given: forward(*given) * factor())


def test_diverging_run_ends_and_lists_the_documents_of_its_bad_steps(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = iter([1] * 2 + [math.nan, 1] + [1] * 2 + [math.nan] * 100)  # two packed sequences a step
    spoil(monkeypatch, lambda: next(bad))
    with pytest.raises(UserError, match=r"training, step 7: loss or gradient not finite 5 steps in a row.*bad-steps\.json"):
        train_arm(configure(home, "validation.points=0"), tmp_path / "out", corpus=home / "corpus")
    lines = (tmp_path / "out.partial" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train/loss"] is None for line in lines[:3]] == [False, True, False]
    bad_steps = read_json(tmp_path / "out.partial" / "bad-steps.json")
    assert [entry["step"] for entry in bad_steps] == [3, 4, 5, 6, 7]
    assert all(len(entry["sequences"]) == 2 and entry["sequences"][0]["documents"] for entry in bad_steps)


def test_spike_is_a_loss_beyond_the_deviations_of_the_losses_before_it() -> None:
    calm = [3 + 0.01 * (step % 2) for step in range(127)]
    assert is_spike([*calm, 3.1], 10) and not is_spike([*calm, 3.1], 50)
    assert not is_spike([*calm, 2.0], 10) and not is_spike([*calm[1:], 3.1], 10) and not is_spike([*calm, 9.0], 0)


def test_spike_loads_the_last_checkpoint_and_skips_the_batch(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "is_spike", lambda recent, deviations: len(recent) == 4 and recent[-1] > 20)
    factors = iter([1] * 6 + [10] * 2 + [1] * 100)
    spoil(monkeypatch, lambda: next(factors))
    out = tmp_path / "out"
    manifest = train_arm(configure(home, "validation.points=0"), out, corpus=home / "corpus")
    assert manifest is not None and manifest.counts["rolled_back_steps"] == 1 and manifest.counts["steps"] == 12
    losses = [line["train/loss"] for line in metrics(out)]
    base = [line["train/loss"] for line in metrics(home / "base")]
    assert losses[:3] == base[:3] and losses[3] == pytest.approx(10 * base[3])
    # as if the step had been skipped
    monkeypatch.undo()
    factors = iter([1] * 6 + [math.nan] * 2 + [1] * 100)
    spoil(monkeypatch, lambda: next(factors))
    train_arm(configure(home, "validation.points=0"), tmp_path / "skipped", corpus=home / "corpus")
    assert (out / "weights.safetensors").read_bytes() == (tmp_path / "skipped" / "weights.safetensors").read_bytes()


def test_only_matrices_decay() -> None:
    decayed, not_decayed = make_optimizers(small_model(), TrainConfig())[0].param_groups
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in not_decayed["params"]} == {1}
    assert len(decayed["params"]) + len(not_decayed["params"]) == len(list(small_model().parameters()))


def test_the_learning_rate_warms_up_and_falls_to_its_final_fraction() -> None:
    recipe = TrainConfig(learning_rate=1.0, warmup_fraction=0.1, final_learning_rate_fraction=0.2)
    rates = [learning_rate(recipe, step, 101) for step in range(101)]
    assert rates[:11] == pytest.approx([*[n / 10 for n in range(1, 11)], 1.0])
    assert rates[55] == pytest.approx(0.6, abs=1e-12) and rates[-1] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    stable = recipe.model_copy(update={"schedule": "warmup-stable-decay", "decay_fraction": 0.5})
    rates = [learning_rate(stable, step, 100) for step in range(100)]
    assert rates[9:50] == [1.0] * 41 and rates[-1] == pytest.approx(0.2) and rates[74] == pytest.approx(0.6)
    constant = recipe.model_copy(update={"schedule": "constant"})
    assert {learning_rate(constant, step, 101) for step in range(10, 101)} == {1.0}


def run_arm(home: Path, out: Path, arm: str, *overrides: str) -> Manifest:
    inputs = {
        "sbp": {"synthetic": home / "synthetic"},
        "synthesizer": {"pairs": home / "pairs", "start": home / "base"},
    }
    return train_arm(configure(home, *overrides), out, arm, corpus=home / "corpus", **inputs.get(arm, {}))


@pytest.mark.parametrize("arm", ["baseline", "sbp", "synthesizer"])
def test_an_interrupted_run_ends_with_the_same_bytes_as_an_unbroken_one(
    arm: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_arm(home, tmp_path / "whole", arm)
    assert whole.counts["steps"] >= 5
    real_step = loop.train_step
    for interrupted_at in (3, 1):  # the second attempt reaches step 3 + 1
        calls = iter(range(100))

        def step(*given, calls=calls, stop=interrupted_at, **settings):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return real_step(*given, **settings)

        monkeypatch.setattr(loop, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            run_arm(home, tmp_path / "broken", arm)
        assert list((tmp_path / "broken.partial" / CHECKPOINTS).glob(f"*/{MARKER}"))
    monkeypatch.undo()
    with open(tmp_path / "broken.partial" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "train/loss": 9.5}\n{"step": 5, "tr')  # as if killed after the metrics of a later step
    broken = run_arm(home, tmp_path / "broken", arm)
    assert broken.fingerprint == whole.fingerprint
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    assert validations(tmp_path / "broken") == validations(tmp_path / "whole")
    assert (tmp_path / "broken/samples.jsonl").read_text() == (tmp_path / "whole/samples.jsonl").read_text() != ""
    assert without_clock(broken) == without_clock(whole) and broken.flops == whole.flops
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    assert not (tmp_path / "broken" / CHECKPOINTS).exists()


def test_lines_of_several_steps_are_their_means_and_survive_an_interruption(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_step = loop.train_step
    calls = iter(range(100))

    def step(*given, **settings):
        if next(calls) == 6:
            signal.raise_signal(signal.SIGTERM)  # comes between two lines
        return real_step(*given, **settings)

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(Stopped, match="stopped after 7 steps") as stopped:
        run_arm(home, tmp_path / "out", "baseline", "log.every_steps=5", "checkpoint.seconds=1000")
    assert stopped.value.exit_code == 143
    monkeypatch.undo()
    run_arm(home, tmp_path / "out", "baseline", "log.every_steps=5", "checkpoint.seconds=1000")
    lines, single = metrics(tmp_path / "out"), metrics(home / "base")
    assert [line["step"] for line in lines] == [4, 9, 11]
    for line, group in zip(lines, (single[:5], single[5:10], single[10:]), strict=True):
        for key in ("train/loss", "train/grad_norm", "data/valid_share", "data/loss_share"):
            assert line[key] == pytest.approx(sum(step[key] for step in group) / len(group), rel=1e-12)
        for key in ("train/tokens", "train/flops", "train/lr", "data/real_epochs"):
            assert line[key] == group[-1][key]
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == (home / "base" / "weights.safetensors").read_bytes()


def without_clock(manifest: Manifest) -> dict[str, object]:
    return {name: count for name, count in manifest.counts.items() if not name.endswith("_seconds")}


def test_manifest_of_the_base_run_agrees_with_its_metrics(home: Path) -> None:
    manifest, prepared = Manifest.load(home / "base", "train"), PreparedCorpus(home / "corpus")
    counts, lines = manifest.counts, metrics(home / "base")
    assert counts["steps"] == len(lines) == 12
    assert [line["step"] for line in lines] == list(range(12))
    assert counts["tokens"] == lines[-1]["train/tokens"] == 3072
    real = counts["sources"]["real"]
    assert real["tokens"] == sum(line["data/real_share"] * 256 for line in lines) < 3072
    assert lines[-1]["data/real_epochs"] == real["tokens"] / prepared.unique.tokens == real["epochs"]
    assert counts["valid_share"] == counts["loss_tokens"] / counts["tokens"]
    assert (counts["attention"], counts["precision"], counts["processes"]) == ("torch", "float32", 1)  # what auto became
    assert counts["final_loss"] == lines[-1]["train/loss"] < lines[0]["train/loss"]
    seen = (counts["tokens"], counts["visible_pairs"], counts["loss_tokens"])
    assert manifest.flops == training_flops(configure(home).model, prepared.tokenizer.vocabulary_size, *seen)
    assert lines[-1]["train/flops"] == manifest.flops
    assert not load_model(home / "base").training


def test_an_attention_that_cannot_run_here_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"attention: backend 'triton' needs CUDA tensors.*choose another, or auto"):
        run_arm(home, tmp_path / "base", "baseline", "pretrain.attention=triton", "device=cpu")


def test_arms_take_equal_steps_and_sbp_reads_each_synthetic_token_at_most_once(home: Path, tmp_path: Path) -> None:
    base = Manifest.load(home / "base").counts
    sbp = run_arm(home, tmp_path / "sbp", "sbp").counts
    oracle = run_arm(home, tmp_path / "oracle", "oracle").counts
    scarce = run_arm(home, tmp_path / "scarce", "sbp", "arms.sbp.share=1.0").counts
    assert base["steps"] == sbp["steps"] == oracle["steps"] == scarce["steps"]
    assert base["tokens"] == sbp["tokens"] == oracle["tokens"] == scarce["tokens"]
    assert sbp["synthetic_share"]["wanted"] == 0.375
    assert sbp["sources"]["synthetic"]["epochs"] < 1 == scarce["sources"]["synthetic"]["epochs"]
    assert scarce["sources"]["synthetic"]["tokens"] == Corpus(home / "synthetic").tokens
    assert scarce["synthetic_share"]["planned"] < 1
    assert oracle["sources"]["real"]["epochs"] < base["sources"]["real"]["epochs"]


def test_the_synthesizer_starts_from_the_base_weights(home: Path, tmp_path: Path) -> None:
    still = run_arm(home, tmp_path / "still", "synthesizer", "synthesizer.learning_rate=1e-30", "synthesizer.weight_decay=0.0")
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
    config, given = configure(home), {"arm": "synthesizer", "corpus": home / "corpus"}
    with pytest.raises(UserError, match="small: has a vocabulary of 50, the corpus's tokenizer 300"):
        train_arm(config, tmp_path / "out", pairs=home / "pairs", start=tmp_path / "small", **given)
    with pytest.raises(UserError, match=r"pairs: was not made from .*corpus"):
        train_arm(config, tmp_path / "out2", pairs=other / "pairs", start=home / "base", **given)
    with pytest.raises(UserError, match="training baseline: does not read --pairs"):
        train_arm(config, tmp_path / "out3", corpus=home / "corpus", pairs=home / "pairs")
    with pytest.raises(UserError, match="training sbp: needs --synthetic"):
        train_arm(config, tmp_path / "out4", "sbp", corpus=home / "corpus")


def test_arm_trains_by_its_own_recipe_and_seed(home: Path, tmp_path: Path) -> None:
    changed = run_arm(home, tmp_path / "decayed", "decayed", "arms.decayed={seeds=[7], recipe={weight_decay=1.0}}")
    assert changed.config["recipe"]["weight_decay"] == 1.0 and changed.config["seed"] == 7
    assert changed.counts["tokens"] == Manifest.load(home / "base").counts["tokens"]
    with pytest.raises(UserError, match="arm decaid: is unknown; known: baseline, sbp, oracle"):
        run_arm(home, tmp_path / "unknown", "decaid")
