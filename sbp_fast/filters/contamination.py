"""Evaluation texts, and the synthetic documents that contain them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.tokenizer import Tokenizer
from sbp_fast.dedup.shingle_index import Batch
from sbp_fast.dedup.shingles import ShingleTable, shingle_hashes


def evaluation_batches(prepared: PreparedCorpus, questions: Sequence[str]) -> Iterator[Batch]:
    """Yield the held-out documents and the questions as `ShingleIndex` takes them."""
    yield from prepared.heldout.batches()
    tokenizer = prepared.tokenizer
    rows = [[tokenizer.begin, *ids, tokenizer.end] for ids in tokenizer.encode_batch(questions)]
    yield np.array([id for row in rows for id in row], np.uint32), np.cumsum([0, *map(len, rows)])


class QuestionFinder:
    """Finds questions in documents, ignoring white space and case.

    Args:
        questions: task -> its questions with their answers; those of fewer than `width` tokens are no different from a common
            phrase, and are not looked for.
        width: tokens of a shingle.

    Attributes:
        tasks: names of the tasks.
    """

    def __init__(self, questions: Mapping[str, Sequence[str]], tokenizer: Tokenizer, width: int) -> None:
        self._width, self.tasks = width, list(questions)
        texts = [text for of_task in questions.values() for text in of_task]
        self._texts = [_normalize(text) for text in texts]
        self._tasks = np.repeat(np.arange(len(questions)), [len(of_task) for of_task in questions.values()])
        ids = tokenizer.encode_batch(texts)
        long = [number for number, row in enumerate(ids) if len(row) >= width]
        table = ShingleTable.build([np.array(ids[number]) for number in long], width)
        order = np.argsort(table.hashes)
        self._hashes = table.hashes[order]
        self._owners = np.repeat(long, np.diff(table.offsets))[order]

    def contains_question(self, tokens: np.ndarray, text: str) -> bool:
        """Return whether a whole question occurs in a document.

        Args:
            tokens: int [tokens] of the document, without <begin> and <end>.
            text: of the document.
        """
        normalized = _normalize(text)
        return any(self._texts[number] in normalized for number in self._sharing(tokens))

    def overlapping_tasks(self, tokens: np.ndarray) -> list[int]:
        """Return the indices of the tasks with a question that shares a shingle with a document, in order."""
        return sorted({int(self._tasks[number]) for number in self._sharing(tokens)})

    def _sharing(self, tokens: np.ndarray) -> set[int]:
        """Return the indices of the questions that share a shingle with a document."""
        hashes = shingle_hashes(tokens, self._width)
        ranges = np.stack([np.searchsorted(self._hashes, hashes, side) for side in ("left", "right")], 1)
        return {owner for low, high in ranges.tolist() for owner in self._owners[low:high].tolist()}


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split())
