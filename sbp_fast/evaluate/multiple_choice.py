"""Multiple-choice questions: read from JSONL files, or made from held-out documents (which of four goes on from here?)."""

from __future__ import annotations

import importlib.resources
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np

from sbp_fast.config import EvaluateConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import hash_value
from sbp_fast.pipeline.progress import Console

EMBEDDED = "embedded:"
EMBEDDED_SETS = ("embedded:eval_default_continuation", "embedded:eval_factbook_capital")
CHOICES = 4
PROMPT_CHARACTERS, CHOICE_CHARACTERS, LEAST_CHARACTERS = 400, 160, 40
DISTRACTOR_POOL = 12  # the wrong choices are drawn among this many of the most similar length
SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|[\u3002\uff01\uff1f]\s*|\n+")


@dataclass(frozen=True)
class Question:
    """One question; `answer` is the index of the right one of `choices`."""

    id: str
    source: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class QuestionSet:
    """Questions that make up one metric."""

    metric: str
    questions: tuple[Question, ...]

    @property
    def fingerprint(self) -> str:
        return hash_value([self.metric, [asdict(question) for question in self.questions]])

    @property
    def chance(self) -> float:
        """Accuracy expected of blind guessing."""
        return float(np.mean([1 / len(question.choices) for question in self.questions]))


@dataclass(frozen=True)
class Cut:
    """A held-out document cut in two: what is asked, and what rightly follows."""

    id: str
    group: str
    head: str
    rest: str


def question_sets(config: EvaluateConfig, seed: int, corpus: PreparedCorpus, console: Console) -> list[QuestionSet]:
    """The question sets that the configuration asks for.

    Raises:
        UserError: a file that is missing or malformed (with the line), two files of one name.
    """
    if config.choices == "auto" and not corpus.embedded:
        made = continuation_questions(corpus, config.continuation_questions, seed)
        console.say(f"multiple choice: {len(made)} continuation questions made from held-out documents")
        return [QuestionSet("continuation_accuracy", tuple(made))] if made else []
    if config.choices == "auto":
        console.say(f"multiple choice: {', '.join(EMBEDDED_SETS)}")
    return read_question_files(EMBEDDED_SETS if config.choices == "auto" else config.choices)


def read_question_files(choices: str | Sequence[str]) -> list[QuestionSet]:
    """The question sets of one or more files, each its own metric.

    Raises:
        UserError: a file that is missing or malformed (with the line), two files of one name.
    """
    sets: dict[str, QuestionSet] = {}
    for path in [choices] if isinstance(choices, str) else choices:
        metric = metric_name(path)
        if metric in sets:
            raise UserError(path, f"a second file for the metric {metric}", "rename it")
        sets[metric] = QuestionSet(metric, tuple(read_questions(path)))
    return list(sets.values())


def metric_name(path: str) -> str:
    """`eval_CORPUS_NAME.jsonl` measures NAME_accuracy; any other file, its own name with _accuracy."""
    stem = PurePosixPath(path.removeprefix(EMBEDDED)).name.partition(".")[0]
    named = re.fullmatch(r"eval_[^_]+_(.+)", stem)
    return f"{named[1] if named else stem}_accuracy"


def read_questions(path: str) -> list[Question]:
    """Questions of a JSONL file, local, `embedded:NAME` or any fsspec URL, compressed or not.

    A record has `prompt`, `choices` (two or more strings) and `answer` (index of the right one); optional are
    `prompt_in_style` (used instead of `prompt`: worded as the corpus words it), `id` and `source`.

    Raises:
        UserError: naming the file and the line.
    """
    lines = _read_lines(path)
    questions = [_question(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise UserError(path, "holds no question", "give a JSONL file with prompt, choices and answer in each line")
    return questions


def _read_lines(path: str) -> list[str]:
    place = path
    if path.startswith(EMBEDDED):
        name = path.removeprefix(EMBEDDED)
        place = str(importlib.resources.files("sbp_fast.data") / "embedded" / f"{name}.jsonl")
    try:
        with fsspec.open(place, "rb", compression="infer") as file:
            return file.read().decode("utf-8").split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(path, "no such file", "correct evaluate.choices") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(path, f"cannot be read: {error}", "check that it is whole and that you may read it") from None
    except UnicodeDecodeError as error:
        raise UserError(path, f"not UTF-8 at byte {error.start}", "save it as UTF-8") from None


def _question(path: str, number: int, line: str) -> Question:
    where = f"{path}, line {number}"
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(where, f"not valid JSON: {error.msg}", "correct or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(where, "not a JSON object", "write an object with prompt, choices and answer")
    prompt, choices, answer = record.get("prompt_in_style") or record.get("prompt"), record.get("choices"), record.get("answer")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(where, "has no prompt", "add a text as prompt")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise UserError(where, "has no choices", "add a list of two or more texts as choices")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(
            where, f"answer {answer!r} is not one of 0 to {len(choices) - 1}", "give the right choice's index, from 0"
        )
    identity, source = record.get("id", f"{Path(path).name}:{number}"), record.get("source", "questions")
    return Question(str(identity), str(source), prompt, tuple(choices), answer)


def continuation_questions(corpus: PreparedCorpus, count: int, seed: int) -> list[Question]:
    """At most `count` questions, one a held-out document: its head, its own continuation and those of three others.

    The others are of the same source and, where possible, of another original (`corpus.group`), and about as long. A
    document too short to cut, and a source of too few documents, yields none. The same seed gives the same questions.
    """
    generator = np.random.default_rng(seed)
    ids, sources = corpus.heldout.ids, corpus.heldout.sources
    by_source: dict[str, list[Cut]] = {}
    for document in generator.permutation(len(corpus.heldout))[: CHOICES * count]:
        if (parts := cut_text(corpus.text(corpus.heldout, int(document)))) is not None:
            cut = Cut(ids[document], corpus.group(ids[document]), *parts)
            by_source.setdefault(sources[document], []).append(cut)
    made = []
    for source, cuts in sorted(by_source.items()):
        for cut in cuts:
            wrong = _distractors(cuts, cut, generator)
            if len(wrong) == CHOICES - 1:
                answer = int(generator.integers(CHOICES))
                choices = (*wrong[:answer], cut.rest, *wrong[answer:])
                made.append(Question(f"continuation/{cut.id}", source, cut.head, choices, answer))
    return [made[index] for index in sorted(generator.permutation(len(made))[:count])]


def cut_text(text: str) -> tuple[str, str] | None:
    """The head of a text up to a sentence end (else a word end), and what follows; None if it is too short."""
    aim = min(PROMPT_CHARACTERS, len(text) - CHOICE_CHARACTERS)
    if aim < LEAST_CHARACTERS:
        return None
    ends = [match.end() for match in SENTENCE_END.finditer(text, LEAST_CHARACTERS, aim)]
    cut = ends[-1] if ends else _word_end(text, aim)
    head, rest = text[:cut].strip(), text[cut:].strip()
    rest = rest[: _word_end(rest, CHOICE_CHARACTERS)].strip()
    return (head, rest) if head and len(rest) >= LEAST_CHARACTERS else None


def _word_end(text: str, aim: int) -> int:
    """The last place up to `aim` where a word ends; `aim` itself in text without spaces."""
    if len(text) <= aim:
        return len(text)
    space = max(text.rfind(" ", 0, aim + 1), text.rfind("\n", 0, aim + 1))
    return space if space > 0 else aim


def _distractors(cuts: list[Cut], cut: Cut, generator: np.random.Generator) -> list[str]:
    """Three continuations of other documents in `cuts`, among those most alike in length (fewer if there are not as many)."""
    others = {other.rest: other.group for other in cuts if other.rest != cut.rest}
    elsewhere = [rest for rest, group in others.items() if group != cut.group]
    pool = elsewhere if len(elsewhere) >= CHOICES - 1 else list(others)
    pool = sorted(pool, key=lambda rest: abs(len(rest.encode()) - len(cut.rest.encode())))[:DISTRACTOR_POOL]
    return [pool[index] for index in generator.permutation(len(pool))[: CHOICES - 1]]
