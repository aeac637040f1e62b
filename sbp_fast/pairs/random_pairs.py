"""Random pairs: the control in which a seed's partners are documents that belong to other seeds."""

from __future__ import annotations

import numpy as np

ROUNDS, TRIES = 50, 200


def shuffle_partners(seeds: np.ndarray, partners: np.ndarray, seed: int) -> np.ndarray:
    """Return other partners for the same seeds, each document as often a partner as before.

    The partners are permuted at random. Then each pair that is of one document, related, or a repetition exchanges its partner
    with a random pair such that both are none of these. In a large corpus few pairs have to.

    Args:
        seeds: int64 [pairs], sorted.
        partners: int64 [pairs], related to the seeds.
        seed: of the random generator.

    Raises:
        ValueError: no such assignment was found, as where every document is related to every other.
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(partners)
    starts, ends = np.searchsorted(seeds, seeds, "left"), np.searchsorted(seeds, seeds, "right")

    def is_usable(pair: int, partner: int) -> bool:
        group = slice(starts[pair], ends[pair])
        return partner != seeds[pair] and partner not in partners[group] and partner not in shuffled[group]

    for _ in range(ROUNDS):
        wrong = np.flatnonzero(_is_wrong(seeds, partners, shuffled)).tolist()
        if not wrong:
            return shuffled
        for pair in wrong:
            others = generator.integers(0, len(seeds), TRIES).tolist()
            fitting = (o for o in others if is_usable(pair, shuffled[o]) and is_usable(o, shuffled[pair]))
            other = next(fitting, others[0])  # where none fits, exchange anyway: the next round begins from another assignment
            shuffled[pair], shuffled[other] = shuffled[other], shuffled[pair]
    raise ValueError(f"{len(wrong)} of {len(seeds)} pairs stay related, however their partners are shuffled")


def _is_wrong(seeds: np.ndarray, partners: np.ndarray, shuffled: np.ndarray) -> np.ndarray:
    """Return whether each shuffled pair is of one document, related, or a repetition of an earlier pair; bool [pairs]."""
    documents = int(max(seeds.max(), partners.max())) + 1
    keys = seeds * documents + shuffled
    _, first = np.unique(keys, return_index=True)
    repeated = np.ones(len(keys), bool)
    repeated[first] = False
    return (seeds == shuffled) | np.isin(keys, seeds * documents + partners) | repeated
