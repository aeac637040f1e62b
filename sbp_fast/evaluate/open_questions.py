"""Open questions: read from JSONL files, and answers scored by exact match and token F1 as in SQuAD.

The normalisation and both scores are those of SQuAD's evaluation (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sbp_fast.evaluate.question_files import QuestionRecord, read_questions_of, read_sets
from sbp_fast.pipeline.files import hash_value

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
LINE_END = re.compile(r"[\r\n]")


@dataclass(frozen=True)
class OpenQuestion:
    """One question; `answers` are the accepted ones, `question` is the prompt without its other words, or ""."""

    id: str
    source: str
    prompt: str
    answers: tuple[str, ...]
    question: str = ""


@dataclass(frozen=True)
class OpenQuestionSet:
    """The questions of one task."""

    name: str
    questions: tuple[OpenQuestion, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of the name and the questions."""
        return hash_value([self.name, [asdict(question) for question in self.questions]])

    @property
    def texts(self) -> list[str]:
        """Questions with each of their accepted answers."""
        return [f"{(q.question or q.prompt).strip()} {answer.strip()}" for q in self.questions for answer in q.answers]


def open_question_sets(paths: str | Sequence[str]) -> list[OpenQuestionSet]:
    """Return the question sets of any number of files, one for each file.

    Raises:
        UserError: a file is missing or malformed (the message names the line), or two files give one task.
    """
    return read_sets(paths, lambda path, name: OpenQuestionSet(name, read_open_questions(path)))


def read_open_questions(path: str) -> tuple[OpenQuestion, ...]:
    """Return the questions of a JSONL file (see `read_questions_of`).

    A record has `prompt` and `answers` (one or more strings); optional are `question` (the question alone, which is looked for
    in synthetic documents in place of the prompt), `id` and `source`.

    Raises:
        UserError: a file or a record is unusable; the message names the file and the line.
    """
    return read_questions_of(path, "evaluate.open_questions", "prompt and answers", _question)


def _question(record: QuestionRecord) -> OpenQuestion:
    answers = record.texts("answers", least=1)
    return OpenQuestion(record.id, record.source, record.text("prompt"), answers, record.bare_question())


def first_line(continuation: str) -> str:
    """Return the answer that a generated continuation gives: its text up to the first line end, without space around it."""
    return LINE_END.split(continuation, maxsplit=1)[0].strip()


def normalize(answer: str) -> str:
    """Return an answer in lower case, without ASCII punctuation, English articles and superfluous white space."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Return 1 if the normalised answer equals a normalised accepted one, else 0."""
    return float(normalize(answer) in map(normalize, accepted))


def best_f1(answer: str, accepted: Sequence[str]) -> float:
    """Return the highest F1 of the words of the answer and those of an accepted one, both normalised.

    Where either has no words, F1 is 1 if both have none, else 0.
    """
    return max(_f1(normalize(answer).split(), normalize(one).split()) for one in accepted)


def _f1(words: list[str], accepted: list[str]) -> float:
    if not words or not accepted:
        return float(words == accepted)
    common = (Counter(words) & Counter(accepted)).total()
    return 2 * common / (len(words) + len(accepted))
