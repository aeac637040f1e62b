"""What pairing knows of the documents of a corpus, copies collapsed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import PairConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.shuffle import hash_name
from sbp_fast.dedup.clusters import Copies, first_of_equals, first_of_near_copies
from sbp_fast.dedup.shingles import DocumentShingles
from sbp_fast.errors import UserError
from sbp_fast.neighbors.vectors import READ_BLOCK, Vectors

MINIMUM_DOCUMENTS = 16


@dataclass(frozen=True)
class Documents:
    """The documents that stand for themselves, and what was collapsed into them.

    Attributes:
        rows: int64 [documents], their indices in the unique corpus, ascending.
        vectors: of each document; read as they are needed.
        groups: uint64 [documents], equal for parts of one original that must not be paired.
        shingles: of each document.
        copies: the documents that take no part, by their indices in the unique corpus.
        prepared: what they are documents of.
    """

    rows: np.ndarray
    vectors: Vectors
    groups: np.ndarray
    shingles: DocumentShingles
    copies: Copies
    prepared: PreparedCorpus

    @staticmethod
    def load(prepared: PreparedCorpus, vectors: Vectors, config: PairConfig, folder: Path) -> Documents:
        """Read what `prepare` and `embed` wrote, and collapse copies.

        Args:
            folder: for what does not stay in memory on the way.

        Raises:
            UserError: too few documents, or all of them parts of one original.
        """
        corpus = prepared.unique
        copies = Copies(len(corpus))
        copies.collapse("exact", first_of_equals(corpus[row] for row in range(len(corpus))))
        distinct = copies.representatives
        shingles = DocumentShingles(len(distinct), lambda row: corpus[int(distinct[row])][1:-1], config.shingle_tokens)
        copies.collapse("near", first_of_near_copies(shingles, config.collapse_containment, folder))
        # equal vectors of different texts: the same head, and the encoder saw no more; no index can tell them apart
        copies.collapse("same vector", first_of_equals(_each(vectors.select(copies.representatives))))
        rows = copies.representatives
        shingles = shingles.select(np.searchsorted(distinct, rows))
        if len(rows) < MINIMUM_DOCUMENTS:
            raise UserError(
                prepared.directory,
                f"{len(rows)} unique documents are too few to pair",
                f"give a corpus with at least {MINIMUM_DOCUMENTS}, or raise corpus.unique_share",
            )
        groups = _groups(prepared, rows) if config.exclude_same_group else rows.astype(np.uint64)
        return Documents(rows, vectors.select(rows), groups, shingles, copies, prepared)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads texts and vectors from where they lie; no one there asks what was collapsed."""
        return _reopened, (self.prepared.directory, self.vectors.directory, self.rows, self.groups, self.shingles.n)

    def __len__(self) -> int:
        return len(self.rows)


def _reopened(corpus: Path, vectors: Path, rows: np.ndarray, groups: np.ndarray, shingle_tokens: int) -> Documents:
    prepared = PreparedCorpus(corpus)
    shingles = DocumentShingles(len(rows), lambda row: prepared.unique[int(rows[row])][1:-1], shingle_tokens)
    return Documents(rows, Vectors(vectors, rows, hashed=False), groups, shingles, Copies(0), prepared)


def _each(vectors: Vectors) -> Iterator[np.ndarray]:
    for start in range(0, len(vectors), READ_BLOCK):
        yield from vectors[np.arange(start, min(start + READ_BLOCK, len(vectors)))]


def _groups(prepared: PreparedCorpus, rows: np.ndarray) -> np.ndarray:
    """The hashed name of each document's original. Two with one hash would merely not be paired."""
    ids = (str(id) for part in prepared.unique.column_parts("id") for id in part)
    groups = np.fromiter((hash_name(prepared.group(id), 0) for id in ids), np.uint64, len(prepared.unique))[rows]
    if (groups == groups[0]).all():
        original = prepared.group(prepared.unique.id(int(rows[0])))
        raise UserError(
            prepared.directory,
            f'all documents are parts of one original, "{original}", by their ids',
            "set pair.exclude_same_group to false, or corpus.group_separator to what divides your ids",
        )
    return groups
