"""Which candidate pairs become pairs: groups and near-copies dropped, a band of similarity, degree caps."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

RANDOM_PAIRS = 200_000


def join_both_directions(ids: np.ndarray, similarities: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each pair of documents once, first < second, with its similarity, if either is among the other's neighbours.

    Being related is symmetric while "among the k nearest" is not: a pair that only one of the two found counts for both.

    Args:
        ids: int64 [documents, k]; -1 for none.
        similarities: float32 [documents, k], the same in both directions.
    """
    documents, k = ids.shape
    there = ids.reshape(-1) >= 0
    rows, others = np.repeat(np.arange(documents), k)[there], ids.reshape(-1)[there]
    keys, places = np.unique(np.minimum(rows, others) * documents + np.maximum(rows, others), return_index=True)
    return keys // documents, keys % documents, similarities.reshape(-1)[there][places]


def random_pairs(groups: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs of documents of different groups, drawn with replacement: at most `RANDOM_PAIRS`."""
    first, second = generator.integers(len(groups), size=(2, RANDOM_PAIRS))
    differ = groups[first] != groups[second]
    return first[differ], second[differ]


def low_cut_off(random_similarities: np.ndarray, rate: float) -> float:
    """The least of `random_similarities` that at most a share `rate` of them exceed."""
    return float(np.quantile(random_similarities, 1 - rate, method="higher"))


@dataclass(frozen=True)
class Verdict:
    """What became of each candidate; a candidate with several faults is counted under the first.

    Attributes:
        kept: bool [candidates].
        dropped: fault -> bool [candidates].
    """

    kept: np.ndarray
    dropped: dict[str, np.ndarray]


def judge(faults: dict[str, np.ndarray]) -> Verdict:
    """Keep the candidates without a fault. Order of `faults` = order of precedence; each bool [candidates]."""
    kept = ~np.logical_or.reduce(list(faults.values()))
    earlier = np.zeros_like(kept)
    dropped = {}
    for fault, found in faults.items():
        dropped[fault] = found & ~earlier
        earlier = earlier | found
    return Verdict(kept, dropped)


def cap_degrees(
    first: np.ndarray, second: np.ndarray, scores: np.ndarray, partners_per_seed: int, seeds_per_partner: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
    """Order each pair both ways and keep the best, so that no seed has too many partners and no partner too many seeds.

    Every seed gets its best partner before any gets its second: otherwise the most similar few would fill the popular
    partners, and seeds that have no other would go without. Within such a round the more similar pairs come first.

    Returns:
        seeds, partners, scores of the kept ordered pairs, and how many were dropped by which cap.
    """
    seeds, partners, scores = np.append(first, second), np.append(second, first), np.append(scores, scores)
    by_seed = np.lexsort((partners, -scores, seeds))
    starts = np.flatnonzero(np.diff(seeds[by_seed], prepend=-1))
    place = np.empty_like(by_seed)
    place[by_seed] = np.arange(len(seeds)) - np.repeat(starts, np.diff(starts, append=len(seeds)))
    order = np.lexsort((partners, seeds, -scores, place))
    seeds, partners, scores = seeds[order], partners[order], scores[order]
    outcome = _take_in_turn(seeds, partners, partners_per_seed, seeds_per_partner)
    kept = outcome == 0
    capped = {"seed_cap": int((outcome == 1).sum()), "partner_cap": int((outcome == 2).sum())}
    return seeds[kept], partners[kept], scores[kept], capped


@numba.njit(cache=True)
def _take_in_turn(seeds: np.ndarray, partners: np.ndarray, partners_per_seed: int, seeds_per_partner: int) -> np.ndarray:
    """For each pair in turn: 0 where taken, 1 where the seed was full, 2 where only the partner was."""
    documents = max(seeds.max(), partners.max()) + 1 if len(seeds) else 0
    partners_of, seeds_of = np.zeros(documents, np.int64), np.zeros(documents, np.int64)
    outcome = np.zeros(len(seeds), np.int8)
    for pair in range(len(seeds)):
        seed, partner = seeds[pair], partners[pair]
        if partners_of[seed] >= partners_per_seed:
            outcome[pair] = 1
        elif seeds_of[partner] >= seeds_per_partner:
            outcome[pair] = 2
        else:
            partners_of[seed] += 1
            seeds_of[partner] += 1
    return outcome
