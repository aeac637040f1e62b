"""The texts that models are evaluated on: which documents hold them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.tokenizer import Tokenizer
from sbp_fast.dedup.shingle_index import Batch
from sbp_fast.dedup.shingles import ShingleTable, shingle_hashes
from sbp_fast.evaluate.multiple_choice import Question, QuestionSet


def question_texts(sets: Sequence[QuestionSet]) -> list[str]:
    """Each question with its right answer."""
    return [_text(question) for one in sets for question in one.questions]


def _text(question: Question) -> str:
    return f"{question.prompt.strip()} {question.choices[question.answer].strip()}"


def evaluation_batches(prepared: PreparedCorpus, questions: Sequence[str]) -> Iterator[Batch]:
    """The held-out documents and the questions as `ShingleIndex` takes them."""
    yield from prepared.heldout.batches()
    tokenizer = prepared.tokenizer
    rows = [[tokenizer.begin, *ids, tokenizer.end] for ids in tokenizer.encode_batch(questions)]
    yield np.array([id for row in rows for id in row], np.uint32), np.cumsum([0, *map(len, rows)])


class QuestionFinder:
    """Finds questions in documents, white space and case apart.

    Only questions of at least `width` tokens are looked for: a shorter one is no different from a common phrase.
    """

    def __init__(self, questions: Sequence[str], tokenizer: Tokenizer, width: int) -> None:
        self._width = width
        self._texts = [_plain(text) for text in questions]
        ids = tokenizer.encode_batch(questions)
        long = [number for number, row in enumerate(ids) if len(row) >= width]
        table = ShingleTable.build([np.array(ids[number]) for number in long], width)
        order = np.argsort(table.hashes)
        self._hashes = table.hashes[order]
        self._owners = np.repeat(long, np.diff(table.offsets))[order]

    def holds(self, tokens: np.ndarray, text: str) -> bool:
        """Whether a document, given by its tokens without <begin> and <end> and its text, has a whole question in it."""
        hashes = shingle_hashes(tokens, self._width)
        places = np.stack([np.searchsorted(self._hashes, hashes, side) for side in ("left", "right")], 1)
        asked = {owner for low, high in places.tolist() for owner in self._owners[low:high].tolist()}
        plain = _plain(text)
        return any(self._texts[number] in plain for number in asked)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
