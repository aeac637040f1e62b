"""Multiple-choice questions: read from JSONL files, or made from test documents (which of four texts comes next?)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from sbp_fast.config import EvaluateConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.question_files import QuestionRecord, read_questions_of, read_sets
from sbp_fast.pipeline.files import hash_value
from sbp_fast.pipeline.progress import Console

EMBEDDED_SETS = ("embedded:eval_default_continuation", "embedded:eval_factbook_capital")
CHOICES = 4
PROMPT_CHARACTERS, CHOICE_CHARACTERS, MINIMUM_CHARACTERS = 400, 160, 40
DISTRACTOR_POOL = 12  # wrong choices are sampled from this many, the most similar in length
SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|[\u3002\uff01\uff1f]\s*|\n+")


@dataclass(frozen=True)
class Question:
    """One question; `answer` is the index of the right choice, `question` the prompt without its other words, or ""."""

    id: str
    source: str
    prompt: str
    choices: tuple[str, ...]
    answer: int
    question: str = ""


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one task."""

    name: str
    questions: tuple[Question, ...]

    @property
    def metric(self) -> str:
        """Name of the accuracy that the report shows."""
        return f"{self.name}_accuracy"

    @property
    def fingerprint(self) -> str:
        """Hash of the metric's name and the questions; a question's empty fields count as absent."""
        return hash_value([self.metric, [{k: v for k, v in asdict(q).items() if v != ""} for q in self.questions]])

    @property
    def texts(self) -> list[str]:
        """Questions with their right answers."""
        return [f"{(q.question or q.prompt).strip()} {q.choices[q.answer].strip()}" for q in self.questions]

    @property
    def chance(self) -> float:
        """Accuracy expected of blind guessing."""
        return float(np.mean([1 / len(question.choices) for question in self.questions]))


@dataclass(frozen=True)
class SplitDocument:
    """A held-out document split in two: the prompt, and its own continuation."""

    id: str
    group: str
    prompt: str
    continuation: str


def question_sets(config: EvaluateConfig, seed: int, corpus: PreparedCorpus, console: Console) -> list[QuestionSet]:
    """Return the question sets that the configuration asks for.

    Raises:
        UserError: a file is missing or malformed (the message names the line), or two files give one metric.
    """
    if config.choices == "auto" and not corpus.embedded:
        questions = continuation_questions(corpus, config.continuation_questions, seed)
        console.say(f"multiple choice: {len(questions)} continuation questions made from test documents")
        return [QuestionSet("continuation", tuple(questions))] if questions else []
    if config.choices == "auto":
        console.say(f"multiple choice: {', '.join(EMBEDDED_SETS)}")
    return read_question_files(EMBEDDED_SETS if config.choices == "auto" else config.choices)


def read_question_files(choices: str | Sequence[str]) -> list[QuestionSet]:
    """Return the question sets of one or more files, one for each file.

    Raises:
        UserError: a file is missing or malformed (the message names the line), or two files give one task.
    """
    return read_sets(choices, lambda path, name: QuestionSet(name, read_questions(path)))


def read_questions(path: str) -> tuple[Question, ...]:
    """Return the questions of a JSONL file (see `read_questions_of`).

    A record has `prompt`, `choices` (two or more strings) and `answer` (index of the right one); optional are
    `prompt_in_style` (the prompt in the corpus's style, used in place of `prompt`), `question` (the question alone, which is
    looked for in synthetic documents in place of the prompt), `id` and `source`.

    Raises:
        UserError: a file or a record is unusable; the message names the file and the line.
    """
    return read_questions_of(path, "evaluate.choices", "prompt, choices and answer", _question)


def _question(record: QuestionRecord) -> Question:
    prompt = record.text("prompt_in_style" if record.content.get("prompt_in_style") else "prompt")
    choices, answer = record.texts("choices", least=2), record.content.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(
            record.where, f"answer {answer!r} is not one of 0 to {len(choices) - 1}", "give the right choice's index, from 0"
        )
    return Question(record.id, record.source, prompt, choices, answer, record.bare_question())


def continuation_questions(corpus: PreparedCorpus, count: int, seed: int) -> list[Question]:
    """Return at most `count` questions, each made of a test document: its beginning, and four possible continuations.

    One continuation is the document's own. The other three come from documents of the same source and, where possible, of
    another original (`corpus.group`), and are about as long. Documents too short to split and sources with too few documents
    are left out. The same seed gives the same questions.
    """
    generator = np.random.default_rng(seed)
    ids, sources = corpus.heldout.ids, corpus.heldout.sources
    by_source: dict[str, list[SplitDocument]] = {}
    for document in generator.permutation(corpus.test)[: CHOICES * count]:
        if (parts := split_text(corpus.text(corpus.heldout, int(document)))) is not None:
            split = SplitDocument(ids[document], corpus.group(ids[document]), *parts)
            by_source.setdefault(sources[document], []).append(split)
    questions = []
    for source, splits in sorted(by_source.items()):
        for split in splits:
            wrong = _distractors(splits, split, generator)
            if len(wrong) == CHOICES - 1:
                answer = int(generator.integers(CHOICES))
                choices = (*wrong[:answer], split.continuation, *wrong[answer:])
                questions.append(Question(f"continuation/{split.id}", source, split.prompt, choices, answer))
    return [questions[index] for index in sorted(generator.permutation(len(questions))[:count])]


def split_text(text: str) -> tuple[str, str] | None:
    """Return the beginning of a text up to a sentence end (else a word end), and what follows; None if it is too short."""
    aim = min(PROMPT_CHARACTERS, len(text) - CHOICE_CHARACTERS)
    if aim < MINIMUM_CHARACTERS:
        return None
    ends = [match.end() for match in SENTENCE_END.finditer(text, MINIMUM_CHARACTERS, aim)]
    end = ends[-1] if ends else _word_end(text, aim)
    prompt, rest = text[:end].strip(), text[end:].strip()
    continuation = rest[: _word_end(rest, CHOICE_CHARACTERS)].strip()
    return (prompt, continuation) if prompt and len(continuation) >= MINIMUM_CHARACTERS else None


def _word_end(text: str, aim: int) -> int:
    """Return the last offset up to `aim` at which a word ends; `aim` itself in text without spaces."""
    if len(text) <= aim:
        return len(text)
    space = max(text.rfind(" ", 0, aim + 1), text.rfind("\n", 0, aim + 1))
    return space if space > 0 else aim


def _distractors(splits: list[SplitDocument], split: SplitDocument, generator: np.random.Generator) -> list[str]:
    """Return three continuations of other documents, sampled from those of the most similar length; or all if fewer."""
    length = len(split.continuation.encode())
    others = {other.continuation: other.group for other in splits if other.continuation != split.continuation}
    elsewhere = [text for text, group in others.items() if group != split.group]
    pool = elsewhere if len(elsewhere) >= CHOICES - 1 else list(others)
    pool = sorted(pool, key=lambda text: abs(len(text.encode()) - length))[:DISTRACTOR_POOL]
    return [pool[index] for index in generator.permutation(len(pool))[: CHOICES - 1]]
