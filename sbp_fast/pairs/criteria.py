"""Criteria by which candidates become pairs: the similarity band, groups, near-duplicates, degree caps."""

from __future__ import annotations

import numba
import numpy as np

from sbp_fast.config import PairConfig

RANDOM_PAIRS = 200_000
REJECT_REASONS = ("below_band", "above_band", "same_group", "near_duplicates")
"""In order of precedence."""
ACCEPTED = -1


def random_pairs(groups: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sample pairs of documents of different groups with replacement: at most `RANDOM_PAIRS`."""
    first, second = generator.integers(len(groups), size=(2, RANDOM_PAIRS))
    differ = groups[first] != groups[second]
    return first[differ], second[differ]


def low_cut_off(random_similarities: np.ndarray, rate: float) -> float:
    """Return the least of `random_similarities` that at most a share `rate` of them exceed."""
    return float(np.quantile(random_similarities, 1 - rate, method="higher"))


def reject_reasons(
    scores: np.ndarray, same_group: np.ndarray, containment: np.ndarray, low: float, config: PairConfig
) -> np.ndarray:
    """Return the first reason to reject each candidate.

    Args:
        scores: float32, cosine similarity.
        same_group: bool, whether both documents are parts of one original.
        containment: float64, the greater of the shares of one's shingles that occur in the other.
        low: lower end of the band.
        config: the other criteria.

    Returns:
        int8 [candidates], index into `REJECT_REASONS`; `ACCEPTED` where there is none.
    """
    in_band, limit = (scores >= low, scores <= config.similarity_high), config.near_duplicate_containment
    applies = [~in_band[0], ~in_band[1], same_group, ~(containment < limit)]  # so that a NaN is rejected
    return np.select(applies, [np.int8(reason) for reason in range(len(REJECT_REASONS))], np.int8(ACCEPTED))


def rank_in_seed(seeds: np.ndarray) -> np.ndarray:
    """Rank of each pair within its seed, from 0; input sorted by seed, then from the best partner down."""
    starts = np.flatnonzero(np.diff(seeds, prepend=-1))
    return np.arange(len(seeds)) - np.repeat(starts, np.diff(starts, append=len(seeds)))


TAKEN, SEED_FULL, PARTNER_FULL = range(3)


@numba.njit(cache=True)
def apply_caps(
    seeds: np.ndarray,
    partners: np.ndarray,
    partner_counts: np.ndarray,
    seed_counts: np.ndarray,
    maximum_partners: int,
    maximum_seeds: int,
) -> np.ndarray:
    """Take ordered pairs one after the other while neither document has reached its cap.

    Args:
        seeds: int64 [pairs].
        partners: int64 [pairs].
        partner_counts: int32 [documents], partners that each document has as a seed; raised by the pairs taken.
        seed_counts: int32 [documents], seeds that each document has as a partner; raised by the pairs taken.
        maximum_partners: of a seed.
        maximum_seeds: of a partner.

    Returns:
        int8 [pairs]: TAKEN, SEED_FULL, or PARTNER_FULL where only the partner was.
    """
    outcome = np.zeros(len(seeds), np.int8)
    for pair in range(len(seeds)):
        seed, partner = seeds[pair], partners[pair]
        if partner_counts[seed] >= maximum_partners:
            outcome[pair] = SEED_FULL
        elif seed_counts[partner] >= maximum_seeds:
            outcome[pair] = PARTNER_FULL
        else:
            partner_counts[seed] += 1
            seed_counts[partner] += 1
    return outcome
