"""Candidate pairs with what decides over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sbp_fast.config import PairConfig
from sbp_fast.neighbors.exact import exact_neighbours
from sbp_fast.neighbors.self_join import Sample, sampled
from sbp_fast.neighbors.vectors import READ_BLOCK, Vectors, similarities
from sbp_fast.pairs.criteria import FAULTLESS, judge
from sbp_fast.pairs.document_statistics import Documents


@dataclass(frozen=True)
class Candidates:
    """Pairs of documents with what decides over them; arrays of [candidates].

    Attributes:
        scores: float32, cosine similarity.
        containment: float64, the greater of the shares of one's shingles that occur in the other; 0 where they are below the
            band or of one group and it decides nothing.
        same_group: bool.
    """

    first: np.ndarray
    second: np.ndarray
    scores: np.ndarray
    containment: np.ndarray
    same_group: np.ndarray

    @staticmethod
    def weigh(
        documents: Documents, first: np.ndarray, second: np.ndarray, low: float, scores: np.ndarray | None = None
    ) -> Candidates:
        """Look up what decides over pairs in a band from `low`; `scores` where they are known."""
        scores = similarities(documents.vectors, first, second) if scores is None else scores
        same_group = documents.groups[first] == documents.groups[second]
        open_question = (scores >= low) & ~same_group
        containment = np.zeros(len(first))
        containment[open_question] = np.maximum(*documents.shingles.containment(first[open_question], second[open_question]))
        return Candidates(first, second, scores, containment, same_group)

    def judge(self, low: float, config: PairConfig) -> np.ndarray:
        """The first fault of each (see `select.judge`), int8."""
        return judge(self.scores, self.same_group, self.containment, low, config)

    def nearest_eligible(self, config: PairConfig) -> tuple[np.ndarray, np.ndarray]:
        """The documents with one here that is neither of their group nor a near-copy, int64 ascending, and the similarity of
        the nearest such, float32."""
        eligible = ~self.same_group & (self.containment < config.near_copy_containment)
        ends, scores = np.append(self.first[eligible], self.second[eligible]), np.tile(self.scores[eligible], 2)
        order = np.lexsort((-scores, ends))
        documents, nearest = np.unique(ends[order], return_index=True)
        return documents, scores[order][nearest]


def sampled_pairs(documents: Documents, low: float, config: PairConfig, seed: int) -> Sample:
    """The pairs that an exact search of sampled documents finds and that qualify: what should be found."""
    queries = sampled(len(documents), config, seed)
    others, scores = exact_neighbours(documents.vectors[queries], queries, _blocks(documents.vectors), config.neighbours)
    there = others >= 0
    exact = Candidates.weigh(documents, queries[np.nonzero(there)[0]], others[there], low, scores[there])
    wanted = exact.judge(low, config) == FAULTLESS
    return Sample(exact.first[wanted], exact.second[wanted], exact.scores[wanted])


def _blocks(vectors: Vectors) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(vectors), READ_BLOCK):
        rows = np.arange(start, min(start + READ_BLOCK, len(vectors)))
        yield rows, vectors[rows]
