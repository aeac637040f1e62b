"""The documents that take part in pairing, with the columns that pairing needs of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import PairConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.shuffle import hash_name
from sbp_fast.dedup.clusters import DuplicateClusters, first_of_equals, first_of_near_duplicates
from sbp_fast.dedup.shingles import DocumentShingles
from sbp_fast.errors import UserError
from sbp_fast.neighbors.vectors import READ_BLOCK, Vectors

MINIMUM_DOCUMENTS = 16


@dataclass(frozen=True)
class DistinctDocuments:
    """One document of each cluster of duplicates.

    Attributes:
        rows: int64 [documents], their indices in the unique corpus, ascending.
        vectors: of each document; read when they are needed.
        groups: uint64 [documents], equal for parts of one original that must not be paired.
        shingles: of each document.
        duplicates: the documents that take no part, by their indices in the unique corpus.
        prepared: the corpus.
    """

    rows: np.ndarray
    vectors: Vectors
    groups: np.ndarray
    shingles: DocumentShingles
    duplicates: DuplicateClusters
    prepared: PreparedCorpus

    @staticmethod
    def load(prepared: PreparedCorpus, vectors: Vectors, config: PairConfig, folder: Path) -> DistinctDocuments:
        """Read the output of `prepare` and `embed`, and leave out duplicates.

        Args:
            prepared: the corpus.
            vectors: of its unique documents.
            config: of the criteria.
            folder: for temporary files.

        Raises:
            UserError: too few documents, or all of them parts of one original.
        """
        corpus = prepared.unique
        duplicates = DuplicateClusters(len(corpus))
        duplicates.merge("exact", first_of_equals(corpus[row] for row in range(len(corpus))))
        distinct = duplicates.representatives
        shingles = DocumentShingles(len(distinct), lambda row: corpus[int(distinct[row])][1:-1], config.shingle_tokens)
        duplicates.merge("near", first_of_near_duplicates(shingles, config.duplicate_containment, folder))
        # different texts have equal vectors if they begin alike and the encoder saw no more; no index can tell them apart
        duplicates.merge("same vector", first_of_equals(_each_vector(vectors.select(duplicates.representatives))))
        rows = duplicates.representatives
        shingles = shingles.select(np.searchsorted(distinct, rows))
        if len(rows) < MINIMUM_DOCUMENTS:
            raise UserError(
                prepared.directory,
                f"{len(rows)} unique documents are too few to pair",
                f"give a corpus with at least {MINIMUM_DOCUMENTS}, or raise corpus.unique_share",
            )
        groups = _groups(prepared, rows) if config.exclude_same_group else rows.astype(np.uint64)
        return DistinctDocuments(rows, vectors.select(rows), groups, shingles, duplicates, prepared)

    def __reduce__(self) -> tuple[Any, ...]:
        """Have another process open texts and vectors by their directories; it needs no duplicates."""
        return _reopen, (self.prepared.directory, self.vectors.directory, self.rows, self.groups, self.shingles.n)

    def __len__(self) -> int:
        return len(self.rows)


def _reopen(corpus: Path, vectors: Path, rows: np.ndarray, groups: np.ndarray, shingle_tokens: int) -> DistinctDocuments:
    prepared = PreparedCorpus(corpus)
    shingles = DocumentShingles(len(rows), lambda row: prepared.unique[int(rows[row])][1:-1], shingle_tokens)
    return DistinctDocuments(rows, Vectors(vectors, rows, hashed=False), groups, shingles, DuplicateClusters(0), prepared)


def _each_vector(vectors: Vectors) -> Iterator[np.ndarray]:
    for start in range(0, len(vectors), READ_BLOCK):
        yield from vectors[np.arange(start, min(start + READ_BLOCK, len(vectors)))]


def _groups(prepared: PreparedCorpus, rows: np.ndarray) -> np.ndarray:
    """Return the hashed name of each document's original. Two originals with one hash would merely not be paired."""
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
