"""Open questions: reading, normalised scores, and answers of a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fabricated_run import CONFIG, QUIET, write_prepared

from sbp_fast.config import EvaluateConfig, RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.metrics import all_metrics
from sbp_fast.evaluate.open_questions import best_f1, exact_match, first_line, normalize, read_open_questions
from sbp_fast.evaluate.question_sets import all_question_sets
from sbp_fast.evaluate.scoring import score_model
from sbp_fast.generate.continuations import continue_prompts
from sbp_fast.model.transformer import Transformer


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    return write_prepared(tmp_path_factory.mktemp("open") / "corpus")


def make_model(corpus: PreparedCorpus) -> Transformer:
    model = Transformer(CONFIG.model, corpus.tokenizer.vocabulary_size)
    model.initialize(3)
    with torch.no_grad():
        model.embed_tokens.weight *= 20
    return model.eval()


def configure(**evaluate: Any) -> RunConfig:
    return CONFIG.model_copy(update={"evaluate": EvaluateConfig(continuation_questions=0, **evaluate)})


def test_normalize_drops_case_punctuation_articles_and_spaces() -> None:
    assert normalize("  The  U.S.A.,\tan Isle of  Theas! ") == "usa isle of theas"


@pytest.mark.parametrize(
    ("answer", "accepted", "match", "f1"),
    [
        ("The Paris.", ["Rome", "paris"], 1.0, 1.0),
        ("city of Paris", ["Paris", "Paris, France"], 0.0, 0.5),
        ("new new york", ["new york york"], 0.0, 2 / 3),
        ("", ["Paris"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),
    ],
)
def test_answers_are_scored_by_the_best_accepted_answer(answer: str, accepted: list[str], match: float, f1: float) -> None:
    assert exact_match(answer, accepted) == match
    assert best_f1(answer, accepted) == pytest.approx(f1, rel=1e-12)


@pytest.mark.parametrize("text", [" Paris\nLondon", " Paris \r\nLondon", "Paris"])
def test_first_line_ends_an_answer(text: str) -> None:
    assert first_line(text) == "Paris"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answers": ["x"]}, "line 2: has no prompt; add a text as prompt"),
        ({"prompt": "Who?", "answers": []}, "line 2: has no answers; add a list of one text or more as answers"),
        ({"prompt": "Who?", "answers": "x"}, "line 2: has no answers"),
        ({"prompt": "Who?", "answers": ["x"], "question": ""}, "line 2: has no question"),
        ([1], "line 2: not a JSON object; write an object with prompt and answers"),
    ],
)
def test_open_question_with_a_malformed_record_names_file_and_line(record: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "quiz.jsonl", {"prompt": "Who?", "answers": ["x"]}, record)
    with pytest.raises(UserError, match=message):
        read_open_questions(path)


def test_open_questions_of_a_missing_file_name_their_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"correct evaluate\.open_questions"):
        read_open_questions(str(tmp_path / "absent.jsonl"))


def test_answers_of_a_model_are_scored_by_one_generation(
    corpus: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = make_model(corpus), []

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments[1]))
        return continue_prompts(*arguments)

    monkeypatch.setattr("sbp_fast.evaluate.metrics.continue_prompts", counted)
    prompts = ["Question: who sailed?\nAnswer:", "the trade of many lands " * 30]
    path = write(tmp_path / "quiz.jsonl", *({"prompt": prompt, "answers": ["x"]} for prompt in prompts))
    config = configure(open_questions=path, answer_tokens=5)
    table, _ = score_model(model, corpus, all_metrics(config, corpus, QUIET)[1:], QUIET, "model")
    answers = [row["answer"] for row in table.to_pylist() if row["metric"] == "quiz_exact_match"]
    assert any(answers) and calls == [2]
    records = ({"prompt": prompt, "answers": ["x", f"The {answer}!"]} for prompt, answer in zip(prompts, answers, strict=True))
    known = configure(open_questions=write(tmp_path / "quiz.jsonl", *records), answer_tokens=5)
    metrics = all_metrics(known, corpus, QUIET)[1:]
    rows = score_model(model, corpus, metrics, QUIET, "model")[0].to_pylist()
    assert [(row["metric"], row["numerator"], row["denominator"]) for row in rows] == [
        ("quiz_exact_match", 1, 1), ("quiz_exact_match", 1, 1), ("quiz_f1", 1, 1), ("quiz_f1", 1, 1)
    ]  # fmt: skip
    assert [row["answer"] for row in rows[:2]] == answers
    assert metrics[1].describe()["variant_of"] == metrics[0].name == "quiz_exact_match"


def test_answers_as_long_as_the_context_are_refused(corpus: PreparedCorpus, tmp_path: Path) -> None:
    path = write(tmp_path / "quiz.jsonl", {"prompt": "Who?", "answers": ["x"]})
    config = configure(open_questions=path, answer_tokens=CONFIG.model.context - 1)
    with pytest.raises(UserError, match=r"evaluate\.answer_tokens = 63: leaves no space for a prompt"):
        score_model(make_model(corpus), corpus, all_metrics(config, corpus, QUIET), QUIET, "model")


def test_two_files_of_one_task_are_refused_whatever_their_kind(corpus: PreparedCorpus, tmp_path: Path) -> None:
    choice = write(tmp_path / "quiz.jsonl", {"prompt": "Who?", "choices": ["x", "y"], "answer": 0})
    (tmp_path / "open").mkdir()
    answer = write(tmp_path / "open" / "quiz.jsonl", {"prompt": "Q: Who?", "question": "Who?", "answers": ["x", "z"]})
    with pytest.raises(UserError, match="name a file each for the task quiz"):
        all_question_sets(EvaluateConfig(choices=choice, open_questions=answer), 0, corpus, QUIET)
    (open_set,) = all_question_sets(EvaluateConfig(continuation_questions=0, open_questions=answer), 0, corpus, QUIET)
    assert open_set.texts == ["Who? x", "Who? z"]
