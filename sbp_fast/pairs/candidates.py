"""Candidate pairs with what decides over them, and how many of those that count were found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbp_fast.config import PairConfig
from sbp_fast.pairs.documents import Documents
from sbp_fast.pairs.join.exact import exact_neighbours
from sbp_fast.pairs.join.join import sampled
from sbp_fast.pairs.select import Verdict, judge
from sbp_fast.pairs.vectors import READ_BLOCK, Vectors, similarities


@dataclass(frozen=True)
class Candidates:
    """Pairs of documents, each once, with what decides over them; arrays of [candidates].

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

    def places(self, first: np.ndarray, second: np.ndarray, documents: int) -> np.ndarray:
        """Where pairs stand that are among these, which stand in order of (first, second). int64 [pairs]."""
        keys = np.minimum(first, second) * documents + np.maximum(first, second)
        return np.searchsorted(self.first * documents + self.second, keys)

    def judge(self, low: float, config: PairConfig) -> Verdict:
        return judge(
            {
                "below_band": self.scores < low,
                "above_band": self.scores > config.similarity_high,
                "same_group": self.same_group,
                "near_copies": self.containment >= config.near_copy_containment,
            }
        )

    def nearest_eligible(self, config: PairConfig, documents: int) -> np.ndarray:
        """Similarity of each document's nearest that is neither of its group nor a near-copy, where there is one."""
        eligible = ~self.same_group & (self.containment < config.near_copy_containment)
        nearest = np.full(documents, -np.inf, dtype=np.float32)
        for end in (self.first, self.second):
            np.maximum.at(nearest, end[eligible], self.scores[eligible])
        return nearest[np.isfinite(nearest)]


def measure_recall(documents: Documents, found: Candidates, low: float, config: PairConfig, seed: int) -> dict[str, Any]:
    """Of the pairs that an exact search of sampled documents finds and that qualify, how many are among the candidates."""
    queries = sampled(len(documents), config, seed)
    others, scores = exact_neighbours(documents.vectors[queries], queries, _blocks(documents.vectors), config.neighbours)
    there = others >= 0
    exact = Candidates.weigh(documents, queries[np.nonzero(there)[0]], others[there], low, scores[there])
    wanted = exact.judge(low, config).kept
    first, second = exact.first[wanted], exact.second[wanted]
    known = np.isin(
        np.minimum(first, second) * len(documents) + np.maximum(first, second),
        found.first * len(documents) + found.second,
    )
    share = float(known.mean()) if len(known) else 1.0
    return {"queries": len(queries), "pairs": len(known), "found": int(known.sum()), "recall": share}


def _blocks(vectors: Vectors) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(vectors), READ_BLOCK):
        rows = np.arange(start, min(start + READ_BLOCK, len(vectors)))
        yield rows, vectors[rows]
