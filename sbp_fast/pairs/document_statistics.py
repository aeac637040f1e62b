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
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.dedup.clusters import DuplicateClusters, first_of_equals, first_of_near_duplicates
from sbp_fast.dedup.shingles import DocumentShingles
from sbp_fast.errors import UserError
from sbp_fast.neighbors.vectors import READ_BLOCK, Split, Vectors

MINIMUM_DOCUMENTS = 16


@dataclass(frozen=True)
class DistinctDocuments:
    """One document of each cluster of duplicates among the unique documents, or among some of the held-out ones.

    Attributes:
        rows: int64 [documents], their indices in the corpus, ascending.
        vectors: of each document; read when they are needed.
        groups: uint64 [documents], equal for parts of one original that must not be paired.
        shingles: of each document.
        duplicates: the documents that take no part, by their positions among those that were given.
        prepared: the prepared corpus.
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
        documents = DistinctDocuments.among(prepared, vectors, np.arange(len(prepared.unique)), config, folder)
        if len(documents) < MINIMUM_DOCUMENTS:
            raise UserError(
                prepared.directory,
                f"{len(documents)} unique documents are too few to pair",
                f"give a corpus with at least {MINIMUM_DOCUMENTS}, or raise corpus.unique_share",
            )
        if (documents.groups == documents.groups[0]).all():
            original = prepared.group(prepared.unique.id(int(documents.rows[0])))
            raise UserError(
                prepared.directory,
                f'all documents are parts of one original, "{original}", by their ids',
                "set pair.exclude_same_group to false, or corpus.group_separator to what divides your ids",
            )
        return documents

    @staticmethod
    def among(
        prepared: PreparedCorpus, vectors: Vectors, rows: np.ndarray, config: PairConfig, folder: Path
    ) -> DistinctDocuments:
        """Leave out duplicates among some documents.

        Args:
            prepared: the corpus.
            vectors: of all documents of the split that `rows` belong to.
            rows: int64, indices in the corpus of that split, ascending.
            config: of the criteria.
            folder: for temporary files.
        """
        corpus: Corpus = getattr(prepared, vectors.split)
        duplicates = DuplicateClusters(len(rows))
        duplicates.merge("exact", first_of_equals(corpus[row] for row in rows.tolist()))
        distinct = rows[duplicates.representatives]
        shingles = DocumentShingles(len(distinct), lambda row: corpus[int(distinct[row])][1:-1], config.shingle_tokens)
        duplicates.merge("near", first_of_near_duplicates(shingles, config.duplicate_containment, folder))
        # different texts have equal vectors if they begin alike and the encoder saw no more; no index can tell them apart
        duplicates.merge("same vector", first_of_equals(_each_vector(vectors.select(rows[duplicates.representatives]))))
        rows = rows[duplicates.representatives]
        shingles = shingles.select(np.searchsorted(distinct, rows))
        groups = hashed_originals(prepared, corpus)[rows] if config.exclude_same_group else rows.astype(np.uint64)
        return DistinctDocuments(rows, vectors.select(rows), groups, shingles, duplicates, prepared)

    def __reduce__(self) -> tuple[Any, ...]:
        """Have another process open texts and vectors by their directories; it needs no duplicates."""
        vectors = self.vectors.directory, self.vectors.split
        return _reopen, (self.prepared.directory, *vectors, self.rows, self.groups, self.shingles.n)

    def __len__(self) -> int:
        return len(self.rows)


def _reopen(
    directory: Path, vectors: Path, split: Split, rows: np.ndarray, groups: np.ndarray, shingle_tokens: int
) -> DistinctDocuments:
    prepared = PreparedCorpus(directory)
    corpus: Corpus = getattr(prepared, split)
    shingles = DocumentShingles(len(rows), lambda row: corpus[int(rows[row])][1:-1], shingle_tokens)
    view = Vectors(vectors, rows, hashed=False, split=split, corpus=corpus)
    return DistinctDocuments(rows, view, groups, shingles, DuplicateClusters(0), prepared)


def _each_vector(vectors: Vectors) -> Iterator[np.ndarray]:
    for start in range(0, len(vectors), READ_BLOCK):
        yield from vectors[np.arange(start, min(start + READ_BLOCK, len(vectors)))]


def hashed_originals(prepared: PreparedCorpus, corpus: Corpus) -> np.ndarray:
    """Return the hashed name of each document's original, uint64. Two originals with one hash would merely not be paired."""
    ids = (str(id) for part in corpus.column_parts("id") for id in part)
    return np.fromiter((hash_name(prepared.group(id), 0) for id in ids), np.uint64, len(corpus))
