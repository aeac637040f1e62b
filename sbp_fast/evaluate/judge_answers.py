"""What a judge says of synthetic documents, and of real ones as a control: questions, answers kept as they come, verdicts."""

from __future__ import annotations

import json
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
from sbp_fast.pipeline.progress import Console

ANSWERS = "answers.jsonl"
SHOWN = 6000  # characters of a text
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
FAULTY = {"non_factual": "yes", "pair_irrelevance": "no"}
"""The answer that counts towards each rate."""


@dataclass(frozen=True)
class Asked:
    """A question to the judge.

    Attributes:
        rate: key of `PROMPTS`.
        group: "synthetic", or which control.
        document: number of the document among the judged ones.
    """

    rate: str
    group: str
    document: int
    prompt: str

    @property
    def key(self) -> str:
        return f"{self.rate}/{self.group}/{self.document}"


def questions(prepared: PreparedCorpus, kept: Corpus, judged: Judged) -> list[Asked]:
    """Of each judged document whether it is factual, of its seed too; whether it is relevant to its seed, to another one, and a
    true partner to that seed."""
    asked = []
    for number, document in enumerate(judged.documents.tolist()):
        text = prepared.text(kept, document)
        seed, elsewhere = (prepared.text(prepared.unique, int(one[number])) for one in (judged.seeds, judged.elsewhere))
        asked += [
            _ask("non_factual", "synthetic", number, text=text),
            _ask("non_factual", "real", number, text=seed),
            _ask("pair_irrelevance", "synthetic", number, text=text, seed=seed),
            _ask("pair_irrelevance", "random", number, text=text, seed=elsewhere),
        ]
        if judged.neighbours[number] >= 0:
            partner = prepared.text(prepared.unique, int(judged.neighbours[number]))
            asked.append(_ask("pair_irrelevance", "neighbours", number, text=partner, seed=seed))
    return asked


def _ask(rate: str, group: str, document: int, **texts: str) -> Asked:
    shown = {name: text[:SHOWN] for name, text in texts.items()}
    return Asked(rate, group, document, re.sub(r"\{(\w+)\}", lambda match: shown[match[1]], PROMPTS[rate]))


def parse_verdict(answer: str) -> str | None:
    """ "yes" or "no" if the answer says one of them and not the other, thoughts left out; None otherwise."""
    said = set(re.findall(r"\b(?:yes|no)\b", re.sub(r"(?s)<think>.*?(?:</think>|\Z)", "", answer).lower()))
    return said.pop() if len(said) == 1 else None


def collect_answers(
    judge: Judge, asked: Sequence[Asked], directory: Path, console: Console, save_clock: Callable[[], None]
) -> dict[str, str]:
    """The answer to each question by its key; each is on disk before the next is waited for, and not asked again."""
    path = directory / ANSWERS
    answers = _read_answers(path)
    waiting = [question for question in asked if question.key not in answers]
    done = len(asked) - len(waiting)
    with console.task("questions to the judge", len(asked), "questions", done) as task, open(path, "ab") as file:
        try:
            for number, answer in judge.ask([question.prompt for question in waiting]):
                answers[waiting[number].key] = answer
                file.write(json.dumps({"key": waiting[number].key, "answer": answer}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                task.advance(1)
                save_clock()
        except UserError:
            if not answers:
                path.unlink()  # nothing is begun yet that other settings would contradict
            raise
    return answers


def _read_answers(path: Path) -> dict[str, str]:
    """What an earlier attempt was answered; a last line that it did not finish is cut off."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    return {line["key"]: line["answer"] for line in map(json.loads, whole.splitlines())}


def verdict_counts(judge: Judge, asked: Sequence[Asked], answers: dict[str, str]) -> dict[str, Any]:
    """For each rate and group how many were asked, how many answers were no verdict, and of the others the share at fault; with
    the judge's identity and the prompts."""
    groups: dict[str, dict[str, Any]] = {}
    for question in asked:
        found = groups.setdefault(question.rate, {}).setdefault(question.group, {"asked": 0, "unparsable": 0, "faulty": 0})
        verdict = parse_verdict(answers[question.key])
        found["asked"] += 1
        found["unparsable"] += verdict is None
        found["faulty"] += verdict == FAULTY[question.rate]
    for found in (one for group in groups.values() for one in group.values()):
        parsed = found["asked"] - found["unparsable"]
        found["rate"] = found["faulty"] / parsed if parsed else None
    return {"identity": judge.identity, "prompts": PROMPTS, "verdicts": groups}


def verdicts_of(asked: Sequence[Asked], answers: dict[str, str], rate: str, documents: int) -> np.ndarray:
    """Of each judged document 1 if the judge finds it at fault, 0 if not, NaN without a verdict. float64 [documents]"""
    found = np.full(documents, np.nan)
    for question in asked:
        verdict = parse_verdict(answers[question.key])
        if (question.rate, question.group) == (rate, "synthetic") and verdict is not None:
            found[question.document] = verdict == FAULTY[rate]
    return found


def judged_rates(counts: dict[str, Any], found: dict[str, np.ndarray]) -> dict[str, Any]:
    """The two rates that need a judge, as `rate` gives them; beside non-factual stand the real seeds."""
    name, verdicts = counts["identity"]["model"], counts["verdicts"]
    seeds, relevance = verdicts["non_factual"]["real"], verdicts["pair_irrelevance"]
    real = np.arange(seeds["asked"] - seeds["unparsable"]) < seeds["faulty"]
    controls = " and ".join(
        f"{relevance[group]['rate']:.0%} of {what}"
        for group, what in (("random", "random pairs"), ("neighbours", "true pairs"))
        if group in relevance and relevance[group]["rate"] is not None
    )
    unclear = {key: verdicts[key]["synthetic"]["unparsable"] for key in found}
    return {
        "non_factual": rate(
            _known(found["non_factual"]),
            f"kept documents in which the judge {name} finds a factual error; {unclear['non_factual']} answers were no verdict",
            real,
            "seeds of the judged documents",
        ),
        "pair_irrelevance": rate(
            _known(found["pair_irrelevance"]),
            f"kept documents in which the judge {name} finds nothing in common with their seed; {unclear['pair_irrelevance']} "
            f"answers were no verdict; it says the same of {controls or 'no control'}",
        ),
    }


def _known(found: np.ndarray) -> np.ndarray:
    return found[~np.isnan(found)] == 1
