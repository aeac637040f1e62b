"""Shingles: the runs of n consecutive tokens of a document, hashed to 64 bits, and containment of one text in another.

Tokens are those of the text alone: strip a stored document's <begin> and <end> first (`document[1:-1]`), or every
document would share them with every other. Two different shingles get the same hash with probability 2^-64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numba
import numpy as np

from sbp_fast.data.permutation import mix

DOCUMENTS_IN_MEMORY = 65_536  # whose shingles are in memory at once: half a gigabyte at a thousand tokens each
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses no bits
EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)


@numba.njit(cache=True)
def window_hashes(tokens: np.ndarray, width: int) -> np.ndarray:
    """Return a rolling polynomial hash of each run of `width` tokens, in order. uint64 [len(tokens) - width + 1]."""
    hashes = np.empty(len(tokens) - width + 1, np.uint64)
    leaving = np.uint64(1)
    for _ in range(width):
        leaving *= BASE
    rolling = np.uint64(0)
    for i in range(len(tokens)):
        rolling = rolling * BASE + mix(np.uint64(tokens[i]) + np.uint64(1))
        if i >= width:
            rolling -= leaving * mix(np.uint64(tokens[i - width]) + np.uint64(1))
        if i >= width - 1:
            hashes[i - width + 1] = mix(rolling)
    if width == 0:
        hashes[0] = 0  # the empty text
    return hashes


@numba.njit(cache=True)
def _shared(hashes: np.ndarray, offsets: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Count the hashes that both rows of each pair hold; rows of a ragged array of sorted hashes. int64 [pairs]."""
    shared = np.zeros(len(first), np.int64)
    for pair in range(len(first)):
        a, a_end = offsets[first[pair]], offsets[first[pair] + 1]
        b, b_end = offsets[second[pair]], offsets[second[pair] + 1]
        while a < a_end and b < b_end:
            left, right = hashes[a], hashes[b]
            shared[pair] += left == right
            a += left <= right
            b += right <= left
    return shared


@numba.njit(cache=True)
def signature(hashes: np.ndarray, slots: int) -> np.ndarray:
    """Return the one-permutation MinHash signature of a set (Li, Owen and Zhang 2012).

    Hashes are distributed over slots, and the smallest of each is kept; an empty slot takes the value of another one, chosen by
    its index alone (Shrivastava 2017).

    Args:
        hashes: uint64 [shingles], at least one.
        slots: of the signature.

    Returns:
        uint64 [slots].
    """
    least = np.full(slots, EMPTY)
    for value in hashes:
        slot = (value >> np.uint64(32)) * np.uint64(slots) >> np.uint64(32)
        least[slot] = min(least[slot], value)
    dense = least.copy()
    for slot in range(slots):
        attempt = 0
        while dense[slot] == EMPTY:
            attempt += 1
            other = mix(np.uint64(slot) << np.uint64(32) | np.uint64(attempt)) % np.uint64(slots)
            dense[slot] = least[other]
    return dense


@numba.njit(cache=True)
def _signatures(hashes: np.ndarray, offsets: np.ndarray, slots: int) -> np.ndarray:
    """Return the signature of each row of a ragged array of hashes, all ones for an empty row. uint64 [rows, slots]."""
    signatures = np.full((len(offsets) - 1, slots), EMPTY)
    for text in range(len(offsets) - 1):
        if offsets[text] < offsets[text + 1]:
            signatures[text] = signature(hashes[offsets[text] : offsets[text + 1]], slots)
    return signatures


@numba.njit(cache=True)
def _sorted_shingles(tokens: np.ndarray, ends: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the fields of a `ShingleTable` of texts that stand one after the other; `ends` are int64 [texts + 1]."""
    offsets = np.zeros(len(ends), np.int64)
    hashes = np.empty(len(tokens) + len(ends) - 1, np.uint64)  # an empty text has one shingle
    size = 0
    for text in range(len(ends) - 1):
        own = tokens[ends[text] : ends[text + 1]]
        row = np.sort(window_hashes(own, min(n, len(own))))
        for index in range(len(row)):
            if index == 0 or row[index] != row[index - 1]:
                hashes[size] = row[index]
                size += 1
        offsets[text + 1] = size
    return hashes[:size].copy(), offsets


def _hash_windows(tokens: np.ndarray | Sequence[int], width: int) -> np.ndarray:
    return window_hashes(np.array(tokens, dtype=np.uint32), width)


def shingle_hashes(tokens: np.ndarray | Sequence[int], n: int) -> np.ndarray:
    """Return the hashes of a text's n-token shingles. uint64, sorted, each once; empty if the text is shorter than n."""
    return np.unique(_hash_windows(tokens, n)) if len(tokens) >= n else np.zeros(0, np.uint64)


def repeated_share(tokens: np.ndarray | Sequence[int], n: int) -> float:
    """Return the share of a text's shingle positions whose shingle occurs in it again; 0 if it is shorter than n."""
    if len(tokens) < n:
        return 0.0
    _, occurrences = np.unique(_hash_windows(tokens, n), return_counts=True)
    return float(occurrences[occurrences > 1].sum() / occurrences.sum())


@dataclass(frozen=True)
class ShingleTable:
    """The shingles of many texts. A text shorter than n tokens has one, the whole text, so only equal texts contain it.

    Attributes:
        hashes: uint64, the sorted shingle hashes of all texts, one text after the other.
        offsets: int64 [texts + 1], where each text's hashes start.
    """

    hashes: np.ndarray
    offsets: np.ndarray

    @staticmethod
    def build(documents: Sequence[np.ndarray], n: int) -> ShingleTable:
        """Hash the n-token shingles of `documents` (token ids without <begin> and <end>)."""
        ends = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        tokens = np.concatenate([np.zeros(0, np.uint32), *documents]).astype(np.uint32)
        return ShingleTable(*_sorted_shingles(tokens, ends, n))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def signatures(self, slots: int) -> np.ndarray:
        """Return MinHash signatures: two texts agree in a slot with about the probability of their Jaccard similarity.

        Returns:
            uint64 [texts, slots].
        """
        return _signatures(self.hashes, self.offsets, slots)

    def containment(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for pairs of texts the share of the first's shingles that occur in the second, and the reverse.

        Args:
            first: integer [pairs], indices of texts.
            second: integer [pairs], indices of texts.

        Returns:
            Two float64 [pairs] in [0, 1].
        """
        first, second = np.array(first, dtype=np.int64), np.array(second, dtype=np.int64)
        shared = _shared(self.hashes, self.offsets, first, second)
        sizes = np.diff(self.offsets)
        return shared / sizes[first], shared / sizes[second]


class DocumentShingles:
    """The shingles of documents that may exceed memory, made as they are asked for.

    Args:
        documents: their number.
        tokens: returns the tokens of a document by its index, without <begin> and <end>.
        n: tokens in a shingle.
    """

    def __init__(self, documents: int, tokens: Callable[[int], np.ndarray], n: int) -> None:
        self.documents, self._tokens, self.n = documents, tokens, n
        self._whole = self._table(np.arange(documents)) if documents <= DOCUMENTS_IN_MEMORY else None

    def __len__(self) -> int:
        return self.documents

    def select(self, documents: np.ndarray) -> DocumentShingles:
        """Return the shingles of some of the documents, indexed in the order given."""
        return DocumentShingles(len(documents), lambda index: self._tokens(int(documents[index])), self.n)

    def tables(self) -> Iterator[ShingleTable]:
        """Yield the shingles of all documents in order, `DOCUMENTS_IN_MEMORY` documents at a time."""
        if self._whole is not None:
            yield self._whole
            return
        for start in range(0, self.documents, DOCUMENTS_IN_MEMORY):
            yield self._table(np.arange(start, min(start + DOCUMENTS_IN_MEMORY, self.documents)))

    def containment(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the same as `ShingleTable.containment`; sorted pairs are the least work."""
        if self._whole is not None:
            return self._whole.containment(first, second)
        of_first, of_second = np.zeros(len(first)), np.zeros(len(first))
        for start in range(0, len(first), DOCUMENTS_IN_MEMORY // 2):
            part = slice(start, start + DOCUMENTS_IN_MEMORY // 2)
            documents, indices = np.unique(np.concatenate([first[part], second[part]]), return_inverse=True)
            of_first[part], of_second[part] = self._table(documents).containment(*np.split(indices, 2))
        return of_first, of_second

    def _table(self, documents: np.ndarray) -> ShingleTable:
        return ShingleTable.build([self._tokens(int(document)) for document in documents], self.n)
