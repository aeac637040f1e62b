"""Metrics of trained models: each is registered once, with how it is computed and how it is shown.

Every metric is a ratio of two sums over its items (bits over bytes of documents, right answers over questions), computed from
log-likelihoods of sequences or from generated answers. So one table of (numerator, denominator) per item holds a model's
scores, and the intervals of `evaluate.statistics` serve every metric. Metrics that share their items share the model's work.
The description is stored with the scores and in `results.json`; tables, plots and sentences use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.likelihood import Advance, Tree, choice_trees, document_trees, log_likelihoods
from sbp_fast.evaluate.multiple_choice import QuestionSet, question_sets
from sbp_fast.evaluate.open_questions import OpenQuestionSet, best_f1, exact_match, first_line, open_question_sets
from sbp_fast.generate.continuations import continue_prompts
from sbp_fast.generate.decoder import SamplingParams
from sbp_fast.model.flops import forward_flops
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.finite import require_finite_rows
from sbp_fast.pipeline.progress import Console
from sbp_fast.registry import Registry


class ScoredItems(Protocol):
    """What a model is asked for one metric, or for several that share it."""

    @property
    def tokens(self) -> int:
        """Number of tokens that `score` reports to `advance`."""
        ...

    def score(self, model: Transformer, name: str, advance: Advance) -> tuple[pa.Table, float]:
        """Return the score rows of every metric that shares the items (see `score_rows`), and the FLOPs that they took."""
        ...


@dataclass(frozen=True)
class Items:
    """The sequences whose log-likelihoods a metric needs, and the function that turns these into scores.

    Attributes:
        trees: packed segments with the predictions to score.
        sequences: number of log-likelihoods.
        to_rows: maps log-likelihoods, float64 [sequences] in nats, to the rows of the score table (see `score_rows`).
    """

    trees: list[Tree]
    sequences: int
    to_rows: Callable[[np.ndarray], pa.Table]

    @property
    def tokens(self) -> int:
        """Number of tokens of the trees."""
        return sum(map(len, self.trees))

    def score(self, model: Transformer, name: str, advance: Advance) -> tuple[pa.Table, float]:
        """Return the score rows, and the FLOPs of the forward passes.

        Raises:
            UserError: a log-likelihood is not finite; the message names the model.
        """
        nats, extent = log_likelihoods(model, self.trees, self.sequences, advance=advance)
        require_finite_rows(nats, "log-likelihood", partial("model {}, sequence {}".format, name))
        shape = model.config, model.vocabulary_size
        return self.to_rows(nats), forward_flops(*shape, extent.tokens, extent.visible_pairs, extent.predictions)


@dataclass(frozen=True)
class Metric:
    """A metric and its description.

    Attributes:
        name: key in score tables and results.json.
        label: name in the report.
        better: whether lower or higher values are better.
        unit: plural name of the items that the sums are over, such as "documents".
        digits: decimals shown, of the percentage if `percent`.
        percent: whether values are shares, shown in percent.
        chance: value expected of guessing; None where guessing has no meaning.
        fingerprint: fingerprint of what the metric reads beside the prepared corpus; "" if nothing.
        items: maps the prepared corpus and the context in tokens to the items; metrics with the same function share its items.
        variant_of: name of the metric that this one is another form of, which tables show apart; "" for most metrics.
    """

    name: str
    label: str
    better: Literal["lower", "higher"]
    unit: str
    digits: int
    items: Callable[[PreparedCorpus, int], ScoredItems]
    percent: bool = False
    chance: float | None = None
    fingerprint: str = ""
    variant_of: str = ""

    def describe(self) -> dict[str, Any]:
        """Return what tables, plots and sentences need, JSON-representable; only a variant has the key `variant_of`."""
        keys = ("label", "better", "unit", "digits", "percent", "chance", *(["variant_of"] if self.variant_of else []))
        return {key: getattr(self, key) for key in keys}


MetricSource = Callable[[RunConfig, PreparedCorpus, Console], Sequence[Metric]]
METRICS: Registry[MetricSource] = Registry("metric")
"""Sources of metrics: each returns any number of them, such as one accuracy for each set of questions."""


def all_metrics(config: RunConfig, prepared: PreparedCorpus, console: Console) -> list[Metric]:
    """Return every metric that the configuration asks for, in the order of registration.

    Raises:
        UserError: a question file is malformed.
        ValueError: two metrics have the same name.
    """
    metrics = [metric for _, source in METRICS.items() for metric in source(config, prepared, console)]
    names = [metric.name for metric in metrics]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"metric {min(repeated)!r} is defined twice")
    return metrics


def score_rows(
    metric: str,
    ids: Any,
    sources: Any,
    numerators: Any,
    denominators: Any,
    choice_scores: Sequence[Any] | None = None,
    answers: Sequence[str] | None = None,
) -> pa.Table:
    """Return score rows: metric, id, source, numerator, denominator; for questions the choices' scores or the answer."""
    return pa.table(
        {
            "metric": pa.array([metric] * len(ids), pa.string()),
            "id": pa.array(ids, pa.string()),
            "source": pa.array(sources, pa.string()),
            "numerator": pa.array(np.asarray(numerators, np.float64)),
            "denominator": pa.array(np.asarray(denominators, np.float64)),
            "scores": pa.array([None] * len(ids) if choice_scores is None else choice_scores, pa.list_(pa.float64())),
            "answer": pa.array([None] * len(ids) if answers is None else answers, pa.string()),
        }
    )


BITS_PER_BYTE = "heldout_bits_per_byte"


def bits_per_byte(config: RunConfig, prepared: PreparedCorpus, console: Console) -> list[Metric]:
    """Return the bits per UTF-8 byte of the test documents; the bits include each document's end token."""
    return [Metric(BITS_PER_BYTE, "Held-out bits per byte", "lower", "documents", 3, _heldout_items)]


def _heldout_items(prepared: PreparedCorpus, context: int) -> Items:
    heldout, test = prepared.heldout, prepared.test

    def to_rows(nats: np.ndarray) -> pa.Table:
        ids, sources, text_bytes = heldout.ids[test], heldout.sources[test], heldout.text_bytes[test]
        return score_rows(BITS_PER_BYTE, ids, sources, -nats / math.log(2), text_bytes)

    return Items(document_trees([heldout[index] for index in test.tolist()], context), len(test), to_rows)


@dataclass(frozen=True)
class ChoiceScore:
    """What the log-probabilities of choices are divided by before the highest is taken as the answer.

    Attributes:
        suffix: end of the metric's name, after the name of the question set's.
        label: end of the metric's label.
        length: maps a choice, without white space around it, to the divisor.
    """

    suffix: str
    label: str
    length: Callable[[str], int]


CHOICE_SCORES = (
    ChoiceScore("", "", lambda choice: len(_joined(choice).encode())),
    ChoiceScore("_raw", " by summed log-probability", lambda choice: 1),
    ChoiceScore("_characters", " by log-probability per character", len),
)
"""The first is what the report shows: per UTF-8 byte, the joining space included, so that long choices are not at a
disadvantage. The others are `acc` and `acc_norm` of lm-evaluation-harness, of which `acc_norm` leaves out the space."""


def accuracies(config: RunConfig, prepared: PreparedCorpus, console: Console) -> list[Metric]:
    """Return the accuracies on each set of multiple-choice questions, one for each of `CHOICE_SCORES`."""
    sets = question_sets(config.evaluate, config.seed, prepared, console)
    return [metric for questions in sets for metric in _accuracies(questions)]


def _accuracies(questions: QuestionSet) -> list[Metric]:
    label = f"{questions.name.replace('_', ' ').capitalize()} accuracy"
    items = partial(_question_items, questions)
    return [
        Metric(
            questions.metric + score.suffix,
            label + score.label,
            "higher",
            "questions",
            1,
            items,
            percent=True,
            chance=questions.chance,
            fingerprint=questions.fingerprint,
            variant_of=questions.metric if score.suffix else "",
        )
        for score in CHOICE_SCORES
    ]


def _question_items(question_set: QuestionSet, prepared: PreparedCorpus, context: int) -> Items:
    """Return the items of multiple-choice questions: each choice's log-probability after the prompt."""
    tokenizer, questions = prepared.tokenizer, question_set.questions
    prompts = tokenizer.encode_batch([question.prompt for question in questions])
    choices = iter(tokenizer.encode_batch([_joined(choice) for question in questions for choice in question.choices]))
    pairs = [
        ([tokenizer.begin, *prompt], [next(choices) for _ in question.choices])
        for question, prompt in zip(questions, prompts, strict=True)
    ]
    ends = np.cumsum([len(question.choices) for question in questions])

    def to_rows(nats: np.ndarray) -> pa.Table:
        by_question = np.split(nats, ends[:-1])
        return pa.concat_tables(_accuracy_rows(question_set, by_question, score) for score in CHOICE_SCORES)

    return Items(choice_trees(pairs, context, where=question_set.metric), int(ends[-1]), to_rows)


def _accuracy_rows(question_set: QuestionSet, nats: Sequence[np.ndarray], score: ChoiceScore) -> pa.Table:
    """Return the score rows of one accuracy, given each question's log-probabilities of its choices, float64 [choices]."""
    questions = question_set.questions
    scores = [
        values / [score.length(choice.strip()) for choice in question.choices]
        for values, question in zip(nats, questions, strict=True)
    ]
    right = [int(np.argmax(values)) == question.answer for values, question in zip(scores, questions, strict=True)]
    ids, sources = [question.id for question in questions], [question.source for question in questions]
    return score_rows(question_set.metric + score.suffix, ids, sources, right, np.ones(len(questions)), scores)


def _joined(choice: str) -> str:
    """Return a choice as it follows its prompt."""
    return f" {choice.strip()}"


@dataclass(frozen=True)
class AnswerItems:
    """Prompts that a model continues, and the function that turns its answers into scores.

    Attributes:
        prompts: int64 [tokens] each.
        sampling: how answers are generated.
        to_rows: maps the continuations' token ids to the rows of the score table (see `score_rows`).
    """

    prompts: list[np.ndarray]
    sampling: SamplingParams
    to_rows: Callable[[list[np.ndarray]], pa.Table]

    @property
    def tokens(self) -> int:
        """Number of tokens of the prompts and of answers of full length."""
        return sum(len(prompt) + self.sampling.maximum_tokens for prompt in self.prompts)

    def score(self, model: Transformer, name: str, advance: Advance) -> tuple[pa.Table, float]:
        """Return the score rows, and the FLOPs of reading the prompts and generating the answers."""
        results = continue_prompts(model, self.prompts, self.sampling, advance)
        generated = np.array([result.generated_tokens for result in results])
        read = np.array([len(prompt) - 1 for prompt in self.prompts]) + generated
        sizes = float(read.sum()), float((read * (read + 1) // 2).sum()), float(generated.sum())
        rows = self.to_rows([result.tokens for result in results])
        return rows, forward_flops(model.config, model.vocabulary_size, *sizes)


ANSWER_SCORES = {"exact_match": ("exact match", exact_match), "f1": ("F1", best_f1)}
"""Scores of open questions: end of the metric's name -> end of its label, and the score of an answer. The first is shown."""


def open_answers(config: RunConfig, prepared: PreparedCorpus, console: Console) -> list[Metric]:
    """Return exact match and F1 of generated answers to each set of open questions."""
    metrics = []
    for questions in open_question_sets(config.evaluate.open_questions):
        items = partial(_open_question_items, questions, config.evaluate.answer_tokens)
        name, label = questions.name, questions.name.replace("_", " ").capitalize()
        first = next(iter(ANSWER_SCORES))
        metrics += [
            Metric(
                f"{name}_{key}",
                f"{label} {words}",
                "higher",
                "questions",
                1,
                items,
                percent=True,
                fingerprint=questions.fingerprint,
                variant_of="" if key == first else f"{name}_{first}",
            )
            for key, (words, _) in ANSWER_SCORES.items()
        ]
    return metrics


def _open_question_items(
    question_set: OpenQuestionSet, answer_tokens: int, prepared: PreparedCorpus, context: int
) -> AnswerItems:
    """Return the items of open questions; a prompt that is too long is truncated at its beginning.

    Raises:
        UserError: the context has no space for a prompt.
    """
    tokenizer, questions = prepared.tokenizer, question_set.questions
    space = context - answer_tokens
    if space < 2:
        problem = f"leaves no space for a prompt in the model's context of {context} tokens"
        raise UserError(f"evaluate.answer_tokens = {answer_tokens}", problem, "lower it")
    encoded = tokenizer.encode_batch([question.prompt for question in questions])
    prompts = [np.array([tokenizer.begin, *prompt], np.int64)[-space:] for prompt in encoded]
    forbidden = tokenizer.begin, tokenizer.partner
    sampling = SamplingParams(tokenizer.begin, tokenizer.end, forbidden, answer_tokens, temperature=0.0)

    def to_rows(continuations: list[np.ndarray]) -> pa.Table:
        answers = [first_line(text) for text in tokenizer.decode_batch(continuations)]
        ids, sources = [question.id for question in questions], [question.source for question in questions]
        tables = []
        for key, (_, score) in ANSWER_SCORES.items():
            values = [score(answer, question.answers) for answer, question in zip(answers, questions, strict=True)]
            tables.append(score_rows(f"{question_set.name}_{key}", ids, sources, values, np.ones(len(ids)), answers=answers))
        return pa.concat_tables(tables)

    return AnswerItems(prompts, sampling, to_rows)


METRICS.register(BITS_PER_BYTE, bits_per_byte)
METRICS.register("accuracy", accuracies)
METRICS.register("open answers", open_answers)
