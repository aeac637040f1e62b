"""Lengths of the documents in a packed stream: the mixes that the kernels are judged on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Forest = tuple[list[int], list[int]]  # lengths and parents
MEAN = 821  # of the lognormal mix: DCLM has 828 tokens a document (arXiv 2509.15248: 582M documents, 482B tokens)
SPREAD = 1.0

MIXES: dict[str, Callable[[np.random.Generator], float]] = {
    "32 to 224": lambda random: float(random.integers(32, 225)),
    "lognormal, mean 821": lambda random: max(16.0, random.lognormal(np.log(MEAN) - SPREAD**2 / 2, SPREAD)),
    "256 to 2048": lambda random: float(random.integers(256, 2049)),
    "2k to 6k": lambda random: float(random.integers(2048, 6145)),
}
PARTNERS = (1, 2, 4, 8, 16)


def documents(mix: str, tokens: int, seed: int = 0) -> Forest:
    """Documents of the mix until the stream is full; the last one is cut. "dense" is one document of everything."""
    if mix == "dense":
        return [tokens], [-1]
    random = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(int(MIXES[mix](random)), left))
    return lengths, [-1] * len(lengths)


def shared_seeds(partners: int, tokens: int, seed: int = 0) -> Forest:
    """Seeds with `partners` partners each, all of one length, so that repeating the seed for each is easy to count.

    The length is the lognormal mix's mean, or what fits one group into the stream; the last group has what room is left.
    """
    length = min(MEAN, tokens // (partners + 1))
    lengths: list[int] = []
    parents: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        root = len(lengths)
        for member in range(partners + 1):
            if (left := tokens - sum(lengths)) > 0:
                lengths.append(min(length, left))
                parents.append(-1 if member == 0 else root)
    return lengths, parents
