import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from fabricated_run import QUIET, write_prepared

from sbp_fast.config import EvaluateConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.multiple_choice import continuation_questions, question_sets, read_questions, split_text
from sbp_fast.evaluate.question_files import task_name

RECORD = {"prompt": "The sea is", "choices": ["blue", "made of tin"], "answer": 0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    return write_prepared(tmp_path_factory.mktemp("questions") / "corpus", heldout=18)


def write(path: Path, *lines: Any) -> str:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["quiz.jsonl", "quiz.jsonl.gz"])
def test_read_questions_returns_every_record_of_a_file(name: str, tmp_path: Path) -> None:
    styled = {**RECORD, "prompt_in_style": "Sea: color:", "id": "q7", "source": "atlas", "answer": 1}
    first, second = read_questions(write(tmp_path / name, RECORD, "", styled))
    assert (first.prompt, first.choices, first.answer, first.source) == ("The sea is", ("blue", "made of tin"), 0, "questions")
    assert (second.prompt, second.id, second.source, second.answer) == ("Sea: color:", "q7", "atlas", 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not valid JSON"),
        ("[1]", "line 2: not a JSON object"),
        ({**RECORD, "prompt": " "}, "line 2: has no prompt"),
        ({**RECORD, "choices": ["one"]}, "line 2: has no choices"),
        ({**RECORD, "choices": ["one", 2]}, "line 2: has no choices"),
        ({**RECORD, "answer": 2}, "line 2: answer 2 is not one of 0 to 1"),
        ({**RECORD, "answer": True}, "line 2: answer True is not one of 0 to 1"),
        ({"prompt": "x", "choices": ["a", "b"]}, "line 2: answer None is not one of 0 to 1"),
    ],
)
def test_read_questions_with_a_malformed_record_names_file_and_line(line: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "quiz.jsonl", RECORD, line)
    with pytest.raises(UserError) as raised:
        read_questions(path)
    assert str(raised.value).startswith(f"{path}, {message}")


def test_read_questions_of_missing_empty_and_undecodable_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_questions(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="holds no question"):
        read_questions(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "café"}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 at byte 15"):
        read_questions(str(tmp_path / "latin.jsonl"))
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(json.dumps(RECORD).encode())[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(str(tmp_path / "torn.jsonl.gz"))


@pytest.mark.parametrize(
    ("path", "task"),
    [
        ("embedded:eval_default_continuation", "continuation"),
        ("data/eval_factbook_capital.jsonl", "capital"),
        ("s3://bucket/my_quiz.jsonl.zst", "my_quiz"),
        ("eval_two.jsonl", "eval_two"),
    ],
)
def test_task_name_derives_from_the_file_name(path: str, task: str) -> None:
    assert task_name(path) == task


def test_choices_auto_reads_the_embedded_sets_only_with_the_embedded_corpus(
    corpus: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    (questions,) = question_sets(EvaluateConfig(), 0, corpus, QUIET)
    assert questions.metric == "continuation_accuracy" and questions.chance == 0.25
    assert all(question.id.startswith("continuation/heldout-") for question in questions.questions)
    monkeypatch.setattr(corpus, "embedded", True)
    sets = {questions.metric: questions for questions in question_sets(EvaluateConfig(), 0, corpus, QUIET)}
    assert {metric: len(questions.questions) for metric, questions in sets.items()} == {
        "continuation_accuracy": 313,
        "capital_accuracy": 216,
    }
    assert sets["capital_accuracy"].questions[0].prompt.endswith("Capital: name:")


def test_two_question_files_of_one_metric_are_refused(corpus: PreparedCorpus, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    paths = tuple(write(tmp_path / folder / "quiz.jsonl", RECORD) for folder in ("one", "two"))
    with pytest.raises(UserError, match="a second file for the task quiz"):
        question_sets(EvaluateConfig(choices=paths), 0, corpus, QUIET)


def test_continuation_questions_have_the_true_continuation_and_three_of_the_same_source(corpus: PreparedCorpus) -> None:
    heldout = corpus.heldout
    texts = {f"continuation/{heldout.ids[i]}": (corpus.text(heldout, i), heldout.sources[i]) for i in corpus.test}
    questions = continuation_questions(corpus, 9, seed=1)
    assert len(questions) == 9 and len({question.id for question in questions}) == 9
    for question in questions:
        text, source = texts[question.id]
        assert question.source == source
        assert text.startswith(question.prompt)
        assert text[len(question.prompt) :].lstrip().startswith(question.choices[question.answer])
        wrong = [choice for index, choice in enumerate(question.choices) if index != question.answer]
        assert len(set(question.choices)) == 4
        for choice in wrong:
            ((other, owner),) = {(text_source, id) for id, (text, text_source) in texts.items() if choice in text}
            assert other == source and owner.rpartition("/")[0] != question.id.rpartition("/")[0]
    assert len({question.answer for question in questions}) > 1
    assert questions == continuation_questions(corpus, 9, seed=1)
    assert questions != continuation_questions(corpus, 9, seed=2)
    assert continuation_questions(corpus, 0, seed=1) == []


def test_split_text_ends_at_a_sentence_else_at_a_word() -> None:
    sentence = "A ship came in from the west with the first snow of winter. "
    split = split_text(sentence * 6)
    assert split is not None
    assert split[0].endswith("winter.") and split[1].startswith("A ship")
    words = split_text("west " * 100)
    assert words is not None and set((words[0] + " " + words[1]).split()) == {"west"}
    assert split_text("雪" * 500) == ("雪" * 340, "雪" * 160)
    assert split_text(sentence) is None
