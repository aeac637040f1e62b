"""Questions to a judge about synthetic documents, with real ones as controls; its answers, saved as they arrive; verdicts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.judge import Judge
from sbp_fast.evaluate.quality import rate
from sbp_fast.evaluate.relevance import Judged
from sbp_fast.pipeline.files import atomic_open, dump_json, hash_value, parse_json
from sbp_fast.pipeline.progress import Console

ANSWERS = "answers.jsonl"
SHOWN_CHARACTERS = 6000  # of each text in a prompt
PROMPTS = {
    "non_factual": (
        "Below is a text. Does it state as a fact anything that is wrong and can be checked: about people, places, events, "
        "dates, numbers, science or works? Fiction, opinion and what cannot be checked are no errors.\n\n"
        "<text>\n{text}\n</text>\n\n"
        "Answer with one word: YES if it has such an error, NO if it has none."
    ),
    "pair_irrelevance": (
        "Below are two texts. Are they about a common topic, event, entity, person, place or object?\n\n"
        "<first>\n{seed}\n</first>\n\n<second>\n{text}\n</second>\n\n"
        "Answer with one word: NO if they have nothing of this in common, YES if they have."
    ),
}
BAD_ANSWERS = {"non_factual": "yes", "pair_irrelevance": "no"}
"""The answer that counts towards each rate."""


@dataclass(frozen=True)
class JudgeQuestion:
    """A question to the judge.

    Attributes:
        rate: key of `PROMPTS`.
        group: "synthetic", or the name of the control.
        document: index of the document among the judged ones.
        prompt: the text that the judge is shown.
    """

    rate: str
    group: str
    document: int
    prompt: str

    @property
    def key(self) -> str:
        """Key of the question in `ANSWERS`."""
        return f"{self.rate}/{self.group}/{self.document}"


def questions(prepared: PreparedCorpus, filtered: Corpus, judged: Judged) -> list[JudgeQuestion]:
    """Return the questions about all judged documents.

    For each document: whether it is factual, and whether its seed is (control); whether it is relevant to its seed, whether it
    is to another document's seed, and whether a true partner of its seed is (controls).
    """
    asked = []
    for number, document in enumerate(judged.documents.tolist()):
        text = prepared.text(filtered, document)
        seed, elsewhere = (prepared.text(prepared.unique, int(index[number])) for index in (judged.seeds, judged.elsewhere))
        asked += [
            _ask("non_factual", "synthetic", number, text=text),
            _ask("non_factual", "real", number, text=seed),
            _ask("pair_irrelevance", "synthetic", number, text=text, seed=seed),
            _ask("pair_irrelevance", "random", number, text=text, seed=elsewhere),
        ]
        if judged.neighbors[number] >= 0:
            partner = prepared.text(prepared.unique, int(judged.neighbors[number]))
            asked.append(_ask("pair_irrelevance", "neighbors", number, text=partner, seed=seed))
    return asked


def _ask(rate: str, group: str, document: int, **texts: str) -> JudgeQuestion:
    shown = {name: text[:SHOWN_CHARACTERS] for name, text in texts.items()}
    return JudgeQuestion(rate, group, document, re.sub(r"\{(\w+)\}", lambda match: shown[match[1]], PROMPTS[rate]))


def parse_verdict(answer: str) -> str | None:
    """Return "yes" or "no" if the answer contains exactly one of them outside <think> blocks, else None."""
    words = set(re.findall(r"\b(?:yes|no)\b", re.sub(r"(?s)<think>.*?(?:</think>|\Z)", "", answer).lower()))
    return words.pop() if len(words) == 1 else None


def collect_answers(
    judge: Judge, asked: Sequence[JudgeQuestion], directory: Path, console: Console, save_clock: Callable[[], None]
) -> dict[str, str]:
    """Return the answer to each question by its key, asking only those that `directory` holds no answer to.

    Each answer is synced to disk before the next is awaited, so a killed attempt loses none.
    """
    path = directory / ANSWERS
    answers = _read_answers(path)
    waiting = [question for question in asked if question.key not in answers]
    done = len(asked) - len(waiting)
    with console.task("questions to the judge", len(asked), "questions", done) as task, open(path, "ab") as file:
        try:
            for number, answer in judge.ask([question.prompt for question in waiting]):
                answers[waiting[number].key] = answer
                file.write(_answer_line(waiting[number].key, answer))
                file.flush()
                os.fsync(file.fileno())
                task.advance(1)
                save_clock()
        except UserError:
            if not answers:
                path.unlink()  # an empty file would make the directory look begun, and refuse corrected settings
            raise
    return answers


def _read_answers(path: Path) -> dict[str, str]:
    """Return the answers of an earlier attempt; a line that is not as it was written goes from the file, and is asked again."""
    answers = {}
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            entry = parse_json(line)
            if line == _answer_line(entry["key"], entry["answer"]):
                answers[entry["key"]] = entry["answer"]
        except (ValueError, KeyError, TypeError):
            continue
    if path.is_file():
        with atomic_open(path) as file:
            file.writelines(_answer_line(key, answer) for key, answer in answers.items())
    return answers


def _answer_line(key: str, answer: str) -> bytes:
    """Return the line of an answer, with the hash of both."""
    entry = {"key": key, "answer": answer}
    return (dump_json(entry | {"xxh3": hash_value(entry)}, ANSWERS) + "\n").encode()


def verdict_counts(judge: Judge, asked: Sequence[JudgeQuestion], answers: dict[str, str]) -> dict[str, Any]:
    """Return the verdicts of each rate and group, with the judge's identity and the prompts.

    A group has the numbers of questions ("asked"), of answers without a verdict ("unparsable") and of bad documents ("faulty"),
    and "rate", the bad documents as a share of those with a verdict.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for question in asked:
        counts = groups.setdefault(question.rate, {}).setdefault(question.group, {"asked": 0, "unparsable": 0, "faulty": 0})
        verdict = parse_verdict(answers[question.key])
        counts["asked"] += 1
        counts["unparsable"] += verdict is None
        counts["faulty"] += verdict == BAD_ANSWERS[question.rate]
    for by_group in groups.values():
        for counts in by_group.values():
            parsed = counts["asked"] - counts["unparsable"]
            counts["rate"] = counts["faulty"] / parsed if parsed else None
    return {"identity": judge.identity, "prompts": PROMPTS, "verdicts": groups}


def verdicts_of(asked: Sequence[JudgeQuestion], answers: dict[str, str], rate: str, documents: int) -> np.ndarray:
    """Return for each judged document 1 if the judge finds it bad, 0 if not, NaN without a verdict; float64 [documents]."""
    bad = np.full(documents, np.nan)
    for question in asked:
        verdict = parse_verdict(answers[question.key])
        if (question.rate, question.group) == (rate, "synthetic") and verdict is not None:
            bad[question.document] = verdict == BAD_ANSWERS[rate]
    return bad


def judged_rates(counts: dict[str, Any], bad: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the two rates that need a judge, as `rate` gives them.

    Args:
        counts: see `verdict_counts`.
        bad: rate -> see `verdicts_of`.
    """
    name, verdicts = counts["identity"]["model"], counts["verdicts"]
    seeds, relevance = verdicts["non_factual"]["real"], verdicts["pair_irrelevance"]
    real = np.arange(seeds["asked"] - seeds["unparsable"]) < seeds["faulty"]
    controls = " and ".join(
        f"{relevance[group]['rate']:.0%} of {label}"
        for group, label in (("random", "random pairs"), ("neighbors", "true pairs"))
        if group in relevance and relevance[group]["rate"] is not None
    )
    unclear = {key: verdicts[key]["synthetic"]["unparsable"] for key in bad}
    return {
        "non_factual": rate(
            _known(bad["non_factual"]),
            f"filtered documents in which the judge {name} finds a factual error; {unclear['non_factual']} answers were no "
            "verdict",
            real,
            "seeds of the judged documents",
        ),
        "pair_irrelevance": rate(
            _known(bad["pair_irrelevance"]),
            f"filtered documents in which the judge {name} finds nothing in common with their seed; "
            f"{unclear['pair_irrelevance']} answers were no verdict; it says the same of {controls or 'no control'}",
        ),
    }


def _known(bad: np.ndarray) -> np.ndarray:
    return bad[~np.isnan(bad)] == 1
