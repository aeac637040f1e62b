"""Candidate pairs with the measurements that decide over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sbp_fast.config import PairConfig
from sbp_fast.neighbors.exact import exact_neighbors
from sbp_fast.neighbors.self_join import RecallSample, sample_queries
from sbp_fast.neighbors.vectors import READ_BLOCK, Vectors, similarities
from sbp_fast.pairs.criteria import ACCEPTED, reject_reasons
from sbp_fast.pairs.document_statistics import DistinctDocuments
from sbp_fast.pipeline.finite import require_finite_rows


@dataclass(frozen=True)
class Candidates:
    """Pairs of documents with the measurements that decide over them; arrays of [candidates].

    Attributes:
        first: int64, a document of each pair.
        second: int64, the other document.
        scores: float32, cosine similarity.
        containment: float64, the greater of the shares of one's shingles that occur in the other; 0 where the pair is below
            the band or of one group, which reject it whatever the containment.
        same_group: bool.
    """

    first: np.ndarray
    second: np.ndarray
    scores: np.ndarray
    containment: np.ndarray
    same_group: np.ndarray

    @staticmethod
    def measure(
        documents: DistinctDocuments, first: np.ndarray, second: np.ndarray, low: float, scores: np.ndarray | None = None
    ) -> Candidates:
        """Measure pairs for a band that begins at `low`; `scores` are computed unless they are given."""
        scores = similarities(documents.vectors, first, second) if scores is None else scores
        rows = documents.rows
        require_finite_rows(scores, "similarity", lambda pair: f"documents {rows[first[pair]]} and {rows[second[pair]]}")
        same_group = documents.groups[first] == documents.groups[second]
        undecided = (scores >= low) & ~same_group
        containment = np.zeros(len(first))
        containment[undecided] = np.maximum(*documents.shingles.containment(first[undecided], second[undecided]))
        return Candidates(first, second, scores, containment, same_group)

    def reject_reasons(self, low: float, config: PairConfig) -> np.ndarray:
        """Return the first reason to reject each candidate (see `criteria.reject_reasons`), int8."""
        return reject_reasons(self.scores, self.same_group, self.containment, low, config)

    def nearest_eligible(self, config: PairConfig) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest candidate of each document that is neither of its group nor a near-duplicate.

        Returns:
            int64 documents that have such a candidate, ascending, and its similarity, float32.
        """
        eligible = ~self.same_group & (self.containment < config.near_duplicate_containment)
        ends, scores = np.append(self.first[eligible], self.second[eligible]), np.tile(self.scores[eligible], 2)
        order = np.lexsort((-scores, ends))
        documents, nearest = np.unique(ends[order], return_index=True)
        return documents, scores[order][nearest]


def sample_pairs(documents: DistinctDocuments, low: float, config: PairConfig, seed: int) -> RecallSample:
    """Return the pairs that an exact search of sampled documents finds and that qualify: those that should be found."""
    queries = sample_queries(len(documents), config, seed)
    others, scores = exact_neighbors(documents.vectors[queries], queries, _blocks(documents.vectors), config.neighbors)
    present = others >= 0
    exact = Candidates.measure(documents, queries[np.nonzero(present)[0]], others[present], low, scores[present])
    qualify = exact.reject_reasons(low, config) == ACCEPTED
    return RecallSample(exact.first[qualify], exact.second[qualify], exact.scores[qualify])


def _blocks(vectors: Vectors) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(vectors), READ_BLOCK):
        rows = np.arange(start, min(start + READ_BLOCK, len(vectors)))
        yield rows, vectors[rows]
