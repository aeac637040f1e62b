"""Random pairs: the control in which a seed's partners are documents that belong to other seeds."""

from __future__ import annotations

import numpy as np

ROUNDS = 100


def shuffle_partners(seeds: np.ndarray, partners: np.ndarray, seed: int) -> np.ndarray:
    """Return other partners for the same seeds, each document as often a partner as before.

    The partners are permuted at random. Pairs of a document with itself, pairs that are related, and pairs that occur twice
    exchange partners with others at random until there are none.

    Args:
        seeds: int64 [pairs].
        partners: int64 [pairs], related to the seeds.
        seed: of the random generator.

    Raises:
        ValueError: no such assignment was found, as where every document is related to every other.
    """
    generator = np.random.default_rng(seed)
    documents = int(max(seeds.max(), partners.max())) + 1
    related = np.unique(seeds * documents + partners)
    shuffled = generator.permutation(partners)
    for _ in range(ROUNDS):
        wrong = np.flatnonzero(_is_unusable(seeds, shuffled, related, documents))
        if not len(wrong):
            return shuffled
        # one after the other: two exchanges of one pair would lose a partner
        for pair, other in zip(wrong.tolist(), generator.integers(0, len(seeds), len(wrong)).tolist(), strict=True):
            shuffled[pair], shuffled[other] = shuffled[other], shuffled[pair]
    raise ValueError(f"{len(wrong)} of {len(seeds)} pairs stay related, however their partners are shuffled")


def _is_unusable(seeds: np.ndarray, partners: np.ndarray, related: np.ndarray, documents: int) -> np.ndarray:
    """Return whether each pair is of one document, related, or a repetition of an earlier pair; bool [pairs]."""
    keys = seeds * documents + partners
    _, first = np.unique(keys, return_index=True)
    repeated = np.ones(len(keys), bool)
    repeated[first] = False
    return (seeds == partners) | np.isin(keys, related) | repeated
