import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fabricated_run import CONFIG, QUIET, write_prepared, write_stage
from sbp_kernels import PackedLayout

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.comparison import compare_scores
from sbp_fast.evaluate.metrics import METRICS, Metric, _heldout_items, all_metrics, score_rows
from sbp_fast.evaluate.multiple_choice import question_sets
from sbp_fast.evaluate.scoring import score_model
from sbp_fast.model.flops import forward_flops
from sbp_fast.model.saved import load_model, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.stages.compare import compare
from sbp_fast.stages.evaluate import SCORES, evaluate


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


def compare_models(out: Path, corpus: Path, models: dict[str, Path], config: RunConfig = CONFIG) -> dict[str, Any]:
    """Score every model and compare; return the counts of the comparison."""
    for arm, directory in models.items():
        evaluate(config, out / arm, corpus=corpus, model=directory, console=QUIET)
    scores = {arm: [out / arm] for arm in models}
    return compare(config, out / "compare", scores=scores, console=QUIET).counts


def test_bits_per_byte_equal_the_loss_of_each_document_alone(inputs: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    corpus, models = inputs
    counts = compare_models(tmp_path, corpus, models)
    prepared = PreparedCorpus(corpus)
    heldout, test = prepared.heldout, prepared.test
    assert 0 < len(test) < len(heldout)
    for arm, directory in models.items():
        model, bits = load_model(directory), 0.0
        for index in test:
            tokens = torch.from_numpy(heldout[index].astype(np.int64))
            for start in range(0, len(tokens) - 1, CONFIG.model.context):  # chunks of the context's length
                chunk = tokens[start : start + CONFIG.model.context + 1]
                layout = PackedLayout.from_lengths([len(chunk) - 1])
                with torch.no_grad():
                    bits += float(model(chunk[:-1], layout, chunk[1:])) / math.log(2)
        score = counts["arms"][arm]["heldout_bits_per_byte"]
        assert score["value"] == pytest.approx(bits / heldout.text_bytes[test].sum(), rel=1e-5)
        assert score["low"] < score["value"] < score["high"]
        assert score["documents"] == sum(source["items"] for source in score["by_source"].values()) == len(test)
    change = counts["differences"]["oracle"]["heldout_bits_per_byte"]
    values = [counts["arms"][arm]["heldout_bits_per_byte"]["value"] for arm in ("oracle", "baseline")]
    assert change["value"] == pytest.approx(values[0] - values[1], rel=1e-12)
    assert "baseline" not in counts["differences"]


def test_choice_score_is_its_log_probability_per_byte(inputs: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
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
    counts = compare_models(tmp_path, corpus, models, config)
    prepared, model = PreparedCorpus(corpus), load_model(models["sbp"])
    (question_set,) = question_sets(chosen, CONFIG.seed, prepared, QUIET)
    rows = pq.read_table(tmp_path / "sbp" / SCORES).to_pylist()
    rows = [row for row in rows if row["metric"] == "quiz_accuracy"]
    right = []
    for question, row in zip(question_set.questions, rows, strict=True):
        scores = []
        choices = [prepared.tokenizer.encode(" " + choice) for choice in question.choices]
        space = CONFIG.model.context - max(map(len, choices)) + 1
        prompt = [prepared.tokenizer.begin, *prepared.tokenizer.encode(question.prompt)][-space:]
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
    assert counts["arms"]["sbp"]["quiz_accuracy"]["value"] == pytest.approx(np.mean(right))


def test_accuracies_of_one_forward_pass_differ_by_what_log_probabilities_are_divided_by(
    inputs: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    corpus, models = inputs
    quiz = {"prompt": "In the spring", "choices": [" snøfall ", "trade of lands", "winter"], "answer": 0}
    (tmp_path / "quiz.jsonl").write_text(json.dumps(quiz) + "\n")
    evaluated = CONFIG.evaluate.model_copy(update={"choices": str(tmp_path / "quiz.jsonl")})
    config = CONFIG.model_copy(update={"evaluate": evaluated})
    read = []
    model, prepared = load_model(models["sbp"]), PreparedCorpus(corpus)
    model.register_forward_pre_hook(lambda module, inputs: read.append(len(inputs[0])))
    metrics = all_metrics(config, prepared, QUIET)
    rows, _ = score_model(model, prepared, metrics, QUIET, "sbp")
    scores = {row["metric"]: np.array(row["scores"]) for row in rows.to_pylist() if row["metric"].startswith("quiz")}
    raw = scores["quiz_accuracy_raw"]
    assert (raw < 0).all() and len(scores) == 3
    assert scores["quiz_accuracy"] == pytest.approx(raw / [9, 15, 7], rel=1e-12)  # bytes with the joining space; ø has two
    assert scores["quiz_accuracy_characters"] == pytest.approx(raw / [7, 14, 6], rel=1e-12)
    tokens = sum(len(prepared.tokenizer.encode(f" {choice.strip()}")) - 1 for choice in quiz["choices"])
    assert read[-1] == 1 + len(prepared.tokenizer.encode(quiz["prompt"])) + tokens and len(read) == 2
    described = [metric.describe() for metric in metrics[1:]]
    assert [metric.get("variant_of") for metric in described] == [None, "quiz_accuracy", "quiz_accuracy"]
    assert [row["numerator"] for row in rows.to_pylist()[-3:]] == [float(np.argmax(scores[name]) == 0) for name in scores]


def test_new_arm_scores_no_other_model_again(inputs: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    corpus, models = inputs
    two = {arm: models[arm] for arm in ("baseline", "sbp")}
    first = compare_models(tmp_path, corpus, two)
    written = {arm: (tmp_path / arm / SCORES).stat().st_mtime_ns for arm in two}
    evaluate(CONFIG, tmp_path / "oracle", corpus=corpus, model=models["oracle"], console=QUIET)
    scores = {arm: [tmp_path / arm] for arm in models}
    second = compare(CONFIG, tmp_path / "again", scores=scores, console=QUIET).counts
    assert {arm: (tmp_path / arm / SCORES).stat().st_mtime_ns for arm in two} == written
    assert second["arms"]["sbp"] == first["arms"]["sbp"] and second["differences"]["sbp"] == first["differences"]["sbp"]


def test_arm_with_two_training_runs_has_the_mean_of_their_scores(inputs: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    corpus, models = inputs
    alone = compare_models(tmp_path, corpus, models)["arms"]
    scores = {"baseline": [tmp_path / "baseline"], "both": [tmp_path / "sbp", tmp_path / "oracle"]}
    both = compare(CONFIG, tmp_path / "both", scores=scores, console=QUIET).counts["arms"]["both"]
    for metric in alone["sbp"]:
        mean = (alone["sbp"][metric]["value"] + alone["oracle"][metric]["value"]) / 2
        assert both[metric]["value"] == pytest.approx(mean, rel=1e-12)


def test_metric_registered_from_outside_is_scored_compared_and_described(
    inputs: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    corpus, models = inputs

    def items(prepared: PreparedCorpus, context: int) -> Any:
        heldout, test, documents = prepared.heldout, prepared.test, _heldout_items(prepared, context)
        ids, sources, lengths = heldout.ids[test], heldout.sources[test], np.diff(heldout.offsets)[test] - 1
        to_rows = lambda nats: score_rows("nats_per_token", ids, sources, -nats, lengths)  # noqa: E731
        return replace(documents, to_rows=to_rows)

    METRICS.register("nats", lambda *_: [Metric("nats_per_token", "Nats per token", "lower", "documents", 2, items)])
    try:
        counts = compare_models(tmp_path, corpus, models)
        with pytest.raises(ValueError, match="metric 'nats' is registered twice"):
            METRICS.register("nats", lambda *_: [])
    finally:
        METRICS.unregister("nats")
    assert counts["metrics"]["nats_per_token"]["label"] == "Nats per token"
    arm, prepared = counts["arms"]["sbp"], PreparedCorpus(corpus)
    tokens = (np.diff(prepared.heldout.offsets) - 1)[prepared.test].sum()
    expected = arm["heldout_bits_per_byte"]["value"] * math.log(2) * prepared.heldout.text_bytes[prepared.test].sum() / tokens
    assert arm["nats_per_token"]["value"] == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UserError, match="was measured by"):
        evaluate(CONFIG, tmp_path / "other", corpus=corpus, model=models["sbp"], console=QUIET)
        scores = {"baseline": [tmp_path / "baseline"], "other": [tmp_path / "other"]}
        compare(CONFIG, tmp_path / "mixed", scores=scores, console=QUIET)


def test_evaluate_counts_the_flops_of_the_tokens_read(inputs: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    corpus, models = inputs
    config = CONFIG.model_copy(update={"evaluate": CONFIG.evaluate.model_copy(update={"continuation_questions": 0})})
    manifest = evaluate(config, tmp_path / "out", corpus=corpus, model=models["sbp"], console=QUIET)
    prepared, context = PreparedCorpus(corpus), CONFIG.model.context
    read = (np.diff(prepared.heldout.offsets) - 1)[prepared.test]
    pairs = sum(sum(range(1, context + 1)) * (n // context) + sum(range(1, n % context + 1)) for n in read.tolist())
    model = load_model(models["sbp"])
    assert manifest.flops == forward_flops(CONFIG.model, model.vocabulary_size, read.sum(), pairs, read.sum())
    assert list(manifest.counts["metrics"]) == ["heldout_bits_per_byte"]


def test_difference_of_single_runs_has_a_value_and_no_interval(inputs: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    corpus, models = inputs
    twins = {"first": models["sbp"], "second": models["sbp"]}
    differences = compare_models(tmp_path, corpus, twins)["differences"]["second"]
    assert len(differences) == 4  # bits per byte and three accuracies
    assert all(difference == {"value": 0, "low": None, "high": None, "runs": [1, 1]} for difference in differences.values())


def test_difference_of_several_runs_has_an_interval_and_an_oracles_share_its_reason(
    inputs: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    corpus, models = inputs
    compare_models(tmp_path, corpus, models)
    first, second, third = (tmp_path / arm for arm in models)
    scores = {"baseline": [first, second], "sbp": [second, third], "oracle": [third, first, second]}
    counts = compare(CONFIG, tmp_path / "several", scores=scores, console=QUIET).counts
    for metric in counts["metrics"]:
        difference = counts["differences"]["oracle"][metric]
        assert difference["runs"] == [3, 2] and difference["low"] < difference["value"] < difference["high"]
        assert counts["arms"]["oracle"][metric]["over"] == "runs and documents"
        assert len(counts["arms"]["oracle"][metric]["run_values"]) == 3
        assert counts["recovered_share_of_oracle"]["oracle"]["sbp"][metric]["value"] is None


def test_runs_scored_on_other_items_are_refused() -> None:
    tables = [score_rows("hits", ids, ["a"] * 3, [1, 0, 1], [1, 1, 1]) for ids in (["x", "y", "z"], ["x", "z", "y"])]
    metrics = {"hits": Metric("hits", "Hits", "higher", "questions", 1, lambda *_: pytest.fail("not called")).describe()}
    with pytest.raises(UserError, match="arm both: has a training run scored on other items of hits"):
        compare_scores({"baseline": tables[:1], "both": tables}, metrics, [], 0.95)


def test_evaluate_with_a_model_of_another_vocabulary_is_refused(inputs: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    corpus, _ = inputs
    other = write_model(tmp_path / "other", 1, 300)
    with pytest.raises(UserError, match="model of other: has a vocabulary of 300"):
        evaluate(CONFIG, tmp_path / "out", corpus=corpus, model=other, console=QUIET)
