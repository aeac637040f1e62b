import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fabricated_run import CONFIG, QUIET, write_prepared, write_stage
from sbp_kernels import PackedLayout

from sbp_fast.errors import UserError
from sbp_fast.model.flops import forward_flops
from sbp_fast.model.saved import load_model, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.stages import evaluate as module
from sbp_fast.stages.evaluate import evaluate, recovered_share


def write_model(directory: Path, seed: int, vocabulary: int) -> Path:
    model = Transformer(CONFIG.model, vocabulary)
    model.initialize(seed)
    with torch.no_grad():
        model.embed_tokens.weight *= 20  # predictions that differ between the arms
    write_stage(directory, "train", {}, lambda directory: save_model(model, directory))
    return directory


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("evaluate")
    vocabulary = write_prepared(root / "corpus").tokenizer.vocabulary_size
    arms = {"baseline": 1, "sbp": 2, "oracle": 3}
    return root / "corpus", {arm: write_model(root / arm, seed, vocabulary) for arm, seed in arms.items()}


def test_bits_per_byte_is_the_loss_of_each_document_alone(inputs: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    corpus, models = inputs
    counts = evaluate(CONFIG, tmp_path / "out", corpus=corpus, models=models, console=QUIET).counts
    heldout = module.PreparedCorpus(corpus).heldout
    for arm, directory in models.items():
        model, bits = load_model(directory), 0.0
        for index in range(len(heldout)):
            tokens = torch.from_numpy(heldout[index].astype(np.int64))
            for start in range(0, len(tokens) - 1, CONFIG.model.context):  # pieces of the context's length
                piece = tokens[start : start + CONFIG.model.context + 1]
                layout = PackedLayout.from_lengths([len(piece) - 1])
                with torch.no_grad():
                    bits += float(model(piece[:-1], layout, piece[1:])) / math.log(2)
        found = counts["arms"][arm]["heldout_bits_per_byte"]
        assert found["value"] == pytest.approx(bits / heldout.text_bytes.sum(), rel=1e-5)
        assert found["low"] < found["value"] < found["high"]
        assert found["documents"] == sum(part["items"] for part in found["by_source"].values()) == len(heldout)
    change = counts["differences"]["oracle"]["heldout_bits_per_byte"]
    values = [counts["arms"][arm]["heldout_bits_per_byte"]["value"] for arm in ("oracle", "baseline")]
    assert change["value"] == pytest.approx(values[0] - values[1], rel=1e-12)
    assert "baseline" not in counts["differences"]


def test_a_choice_is_scored_by_its_log_probability_a_byte(inputs: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    corpus, models = inputs
    long = {
        "prompt": "the ships of our navy " * 20,
        "choices": ["sailed", "came home with the trade of many lands"],
        "answer": 1,
    }
    short = {"prompt": "In the spring", "choices": ["snøfall", "trade of lands", "winter"], "answer": 0}
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (long, short) * 5))
    chosen = CONFIG.evaluate.model_copy(update={"choices": str(tmp_path / "quiz.jsonl")})
    config = CONFIG.model_copy(update={"evaluate": chosen})
    manifest = evaluate(config, tmp_path / "out", corpus=corpus, models=models, console=QUIET)
    prepared, model = module.PreparedCorpus(corpus), load_model(models["sbp"])
    (one,) = module.question_sets(chosen, CONFIG.seed, prepared, QUIET)
    rows = pq.read_table(tmp_path / "out" / "scores-sbp.parquet").to_pylist()
    rows = [row for row in rows if row["metric"] == "quiz_accuracy"]
    right = []
    for question, row in zip(one.questions, rows, strict=True):
        scores = []
        choices = [prepared.tokenizer.encode(" " + choice) for choice in question.choices]
        room = CONFIG.model.context - max(map(len, choices)) + 1
        prompt = [prepared.tokenizer.begin, *prepared.tokenizer.encode(question.prompt)][-room:]
        for choice, tokens in zip(question.choices, choices, strict=True):
            sequence = torch.tensor([*prompt, *tokens])
            targets = torch.full_like(sequence, -100)
            targets[len(prompt) - 1 : -1] = sequence[len(prompt) :]
            with torch.no_grad():
                loss = model(sequence, PackedLayout.from_lengths([len(sequence)]), targets)
            scores.append(-float(loss) / len(f" {choice}".encode()))
        assert row["scores"] == pytest.approx(scores, rel=1e-4)
        right.append(int(np.argmax(scores)) == question.answer)
        assert row["numerator"] == right[-1] and row["id"] == question.id
    assert manifest.counts["arms"]["sbp"]["quiz_accuracy"]["value"] == pytest.approx(np.mean(right))


def test_resumes_by_arm_and_is_deterministic(
    inputs: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, models = inputs
    whole = evaluate(CONFIG, tmp_path / "whole", corpus=corpus, models=models, console=QUIET)
    scored: list[str] = []
    score = module.score

    def killed_at_the_oracle(*arguments: Any) -> Any:
        scored.append(arguments[-1])
        if arguments[-1] == "oracle" and scored.count("oracle") == 1:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(module, "score", killed_at_the_oracle)
    with pytest.raises(KeyboardInterrupt):
        evaluate(CONFIG, tmp_path / "killed", corpus=corpus, models=models, console=QUIET)
    resumed = evaluate(CONFIG, tmp_path / "killed", corpus=corpus, models=models, console=QUIET)
    assert scored == ["baseline", "sbp", "oracle", "oracle"]
    assert resumed.fingerprint == whole.fingerprint and resumed.counts == whole.counts and resumed.flops == whole.flops


def test_flops_are_those_of_the_tokens_read(inputs: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    corpus, models = inputs
    config = CONFIG.model_copy(update={"evaluate": CONFIG.evaluate.model_copy(update={"continuation_questions": 0})})
    manifest = evaluate(config, tmp_path / "out", corpus=corpus, models={"only": models["sbp"]}, console=QUIET)
    twice = evaluate(config, tmp_path / "two", corpus=corpus, models={"a": models["sbp"], "b": models["oracle"]}, console=QUIET)
    heldout, context = module.PreparedCorpus(corpus).heldout, CONFIG.model.context
    read = np.diff(heldout.offsets) - 1
    pairs = sum(sum(range(1, context + 1)) * (n // context) + sum(range(1, n % context + 1)) for n in read.tolist())
    model = load_model(models["sbp"])
    assert manifest.flops == forward_flops(CONFIG.model, model.vocabulary_size, read.sum(), pairs, read.sum())
    assert twice.flops == 2 * manifest.flops
    assert manifest.counts["differences"] == {} and list(manifest.counts["arms"]["only"]) == ["heldout_bits_per_byte"]


def test_differences_are_paired(inputs: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    """A model differs from itself by nothing, whatever the resample."""
    corpus, models = inputs
    twins = {"first": models["sbp"], "second": models["sbp"]}
    differences = evaluate(CONFIG, tmp_path / "out", corpus=corpus, models=twins, console=QUIET).counts["differences"]["second"]
    assert len(differences) == 2
    assert all(found == {"value": 0, "low": 0, "high": 0} for found in differences.values())


def test_a_model_of_another_vocabulary_is_refused(inputs: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    corpus, _ = inputs
    other = write_model(tmp_path / "other", 1, 300)
    with pytest.raises(UserError, match="model of alien: has a vocabulary of 300"):
        evaluate(CONFIG, tmp_path / "out", corpus=corpus, models={"alien": other}, console=QUIET)


def test_recovered_share_is_null_where_the_oracle_may_gain_nothing() -> None:
    draws = np.random.default_rng(0).normal([-2.0, -1.98, -1.9], 0.001, (500, 3))
    found = recovered_share(np.array([-2.0, -1.98, -1.9]), draws, 0.95)
    assert found["value"] == pytest.approx(0.2) and found["low"] < 0.2 < found["high"]
    blind = recovered_share(np.array([-2.0, -1.98, -1.9995]), draws - np.array([0, 0, 0.0995]), 0.95)
    assert blind == {"value": None, "reason": "the oracle's own gain is not distinguishable from zero"}
    worse = recovered_share(np.array([-2.0, -1.98, -2.1]), draws - np.array([0, 0, 0.2]), 0.95)
    assert worse == {"value": None, "reason": "the oracle itself did worse than the baseline"}


def test_fewer_bits_are_a_gain(inputs: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    """SBP equal to the oracle recovers all of its gain if the oracle is the better model, and if it is not there is none."""
    corpus, models = inputs
    metric = "heldout_bits_per_byte"
    counts = evaluate(CONFIG, tmp_path / "all", corpus=corpus, models=models, console=QUIET).counts
    worst, _, best = sorted(models, key=lambda arm: -counts["arms"][arm][metric]["value"])

    def share(baseline: str, oracle: str) -> dict[str, Any]:
        arms = {"baseline": models[baseline], "sbp": models[oracle], "oracle": models[oracle]}
        found = evaluate(CONFIG, tmp_path / oracle, corpus=corpus, models=arms, console=QUIET).counts
        return found["recovered_share_of_oracle"][metric]

    assert share(worst, best) == {"value": 1, "low": 1, "high": 1}
    assert share(best, worst)["reason"] == "the oracle itself did worse than the baseline"
