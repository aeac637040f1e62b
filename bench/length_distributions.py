"""Document lengths in packed sequences: the distributions that the kernels are measured on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SegmentTree = tuple[list[int], list[int]]  # length of each segment, and index of its parent, -1 for none
MEAN = 821  # of the lognormal distribution: DCLM has 828 tokens a document (arXiv 2509.15248: 582M documents, 482B tokens)
SIGMA = 1.0

LENGTH_DISTRIBUTIONS: dict[str, Callable[[np.random.Generator], float]] = {
    "32 to 224": lambda random: float(random.integers(32, 225)),
    "lognormal, mean 821": lambda random: max(16.0, random.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA)),
    "256 to 2048": lambda random: float(random.integers(256, 2049)),
    "2k to 6k": lambda random: float(random.integers(2048, 6145)),
}
PARTNER_COUNTS = (1, 2, 4, 8, 16)


def documents(distribution: str, tokens: int, seed: int = 0) -> SegmentTree:
    """Return documents that fill `tokens`, the last one cut; "dense" is one document of all tokens."""
    if distribution == "dense":
        return [tokens], [-1]
    random = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(int(LENGTH_DISTRIBUTIONS[distribution](random)), left))
    return lengths, [-1] * len(lengths)


def shared_seeds(partners: int, tokens: int) -> SegmentTree:
    """Return seeds with `partners` partners each, all of one length, so that the cost of repeating a seed is easy to count.

    The length is the mean of the lognormal distribution, or the greatest at which one seed with its partners fits; the last
    seed and partners are cut where `tokens` end.
    """
    length = min(MEAN, tokens // (partners + 1))
    lengths: list[int] = []
    parents: list[int] = []
    while tokens - sum(lengths) > 0:
        root = len(lengths)
        for member in range(partners + 1):
            if (left := tokens - sum(lengths)) > 0:
                lengths.append(min(length, left))
                parents.append(-1 if member == 0 else root)
    return lengths, parents
