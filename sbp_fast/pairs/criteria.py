"""Which candidate pairs become pairs: the band of similarity, groups and near-copies, degree caps."""

from __future__ import annotations

import numba
import numpy as np

from sbp_fast.config import PairConfig

RANDOM_PAIRS = 200_000
FAULTS = ("below_band", "above_band", "same_group", "near_copies")
FAULTLESS = -1


def random_pairs(groups: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs of documents of different groups, drawn with replacement: at most `RANDOM_PAIRS`."""
    first, second = generator.integers(len(groups), size=(2, RANDOM_PAIRS))
    differ = groups[first] != groups[second]
    return first[differ], second[differ]


def low_cut_off(random_similarities: np.ndarray, rate: float) -> float:
    """The least of `random_similarities` that at most a share `rate` of them exceed."""
    return float(np.quantile(random_similarities, 1 - rate, method="higher"))


def judge(scores: np.ndarray, same_group: np.ndarray, containment: np.ndarray, low: float, config: PairConfig) -> np.ndarray:
    """The first fault of each candidate, as its place among `FAULTS`; `FAULTLESS` for one that has none. int8 [candidates]

    Args:
        scores: float32, cosine similarity.
        same_group: bool, whether both are parts of one original.
        containment: float64, the greater of the shares of one's shingles that occur in the other.
        low: lower end of the band.
    """
    found = [scores < low, scores > config.similarity_high, same_group, containment >= config.near_copy_containment]
    return np.select(found, [np.int8(fault) for fault in range(len(FAULTS))], np.int8(FAULTLESS))


def turns(seeds: np.ndarray) -> np.ndarray:
    """Of ordered pairs that stand by seed and then from the best partner down: the how-manieth of its seed each is, from 0."""
    starts = np.flatnonzero(np.diff(seeds, prepend=-1))
    return np.arange(len(seeds)) - np.repeat(starts, np.diff(starts, append=len(seeds)))


TAKEN, SEED_FULL, PARTNER_FULL = range(3)


@numba.njit(cache=True)
def take_in_turn(
    seeds: np.ndarray, partners: np.ndarray, partners_of: np.ndarray, seeds_of: np.ndarray, most_partners: int, most_seeds: int
) -> np.ndarray:
    """Take ordered pairs one after the other while there is room for both ends.

    Args:
        seeds, partners: int64 [pairs].
        partners_of, seeds_of: int32 [documents], how many each has as a seed and as a partner; those taken are added.

    Returns:
        int8 [pairs]: TAKEN, SEED_FULL, or PARTNER_FULL where only the partner was.
    """
    outcome = np.zeros(len(seeds), np.int8)
    for pair in range(len(seeds)):
        seed, partner = seeds[pair], partners[pair]
        if partners_of[seed] >= most_partners:
            outcome[pair] = SEED_FULL
        elif seeds_of[partner] >= most_seeds:
            outcome[pair] = PARTNER_FULL
        else:
            partners_of[seed] += 1
            seeds_of[partner] += 1
    return outcome
