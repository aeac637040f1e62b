"""Which documents are seeds, in which order, and which samples are drawn after each, by settings and corpus alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sbp_fast.config import RunConfig
from sbp_fast.data.token_shards.corpus import Corpus


@dataclass(frozen=True)
class SeedPlan:
    """The seeds of a run, cut into shards that are finished one by one.

    Attributes:
        documents: int64 [seeds], indices into the unique corpus.
        first_samples: int64 [seeds], number of the first of the `samples` documents drawn after each.
        samples: documents for each seed.
        shard_seeds: seeds of a shard.
    """

    documents: np.ndarray
    first_samples: np.ndarray
    samples: int
    shard_seeds: int

    @staticmethod
    def make(config: RunConfig, unique: Corpus, context: int) -> SeedPlan:
        """Enough seeds for the tokens wanted, if synthetic documents are as long as real ones."""
        wanted = config.synthesize.oversample * wanted_tokens(config)
        lengths = np.minimum(np.diff(unique.offsets), context)
        samples = config.synthesize.samples_per_seed
        count = max(1, math.ceil(wanted / float(lengths.mean()) / samples))
        documents = SEED_SAMPLERS[config.synthesize.seeds](lengths, count, config.seed)
        return SeedPlan(documents, times_before(documents) * samples, samples, config.synthesize.shard_seeds)

    @cached_property
    def shards(self) -> list[range]:
        """The seeds of each shard."""
        seeds = len(self.documents)
        return [range(start, min(start + self.shard_seeds, seeds)) for start in range(0, seeds, self.shard_seeds)]

    def sample_numbers(self, seed: int) -> tuple[int, ...]:
        """Of the documents drawn after a seed: a document that is a seed again goes on counting."""
        first = int(self.first_samples[seed])
        return tuple(range(first, first + self.samples))


def wanted_tokens(config: RunConfig) -> float:
    """Return the synthetic tokens that the arm with the most of them reads."""
    arms = [arm for arm in config.enabled_arms.values() if arm.synthetic] or [config.arms["sbp"]]
    return max(arm.share * arm.resolve_recipe(config.pretrain).tokens for arm in arms)


def uniform(lengths: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Every document equally often: without replacement until each has been one, then again in another order.

    The paper draws seeds uniformly (arXiv 2509.15248, section 2.3); without replacement none is left out by chance.
    """
    rounds = -(-count // len(lengths))
    orders = [np.random.default_rng([seed, number]).permutation(len(lengths)) for number in range(rounds)]
    return np.concatenate(orders)[:count]


def by_length(lengths: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Documents in proportion to their tokens, so that every token of the corpus is equally often part of a seed.

    Systematic sampling: each document comes as often as expected, rounded up or down; then all are shuffled.
    """
    generator = np.random.default_rng([seed, 0])
    ends = np.cumsum(lengths, dtype=np.float64) / lengths.sum() * count
    return generator.permutation(
        np.searchsorted(ends, np.arange(count) + generator.random(), "right").clip(max=len(lengths) - 1)
    )


SEED_SAMPLERS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {"uniform": uniform, "length": by_length}
"""Name -> (tokens of each document, seeds wanted, run's seed) -> int64 [seeds], indices of documents."""


def times_before(documents: np.ndarray) -> np.ndarray:
    """How often each entry's document comes before it. int64 [seeds]"""
    order = np.argsort(documents, kind="stable")
    ordered = documents[order]
    starts = np.searchsorted(ordered, ordered, "left")
    times = np.empty(len(documents), np.int64)
    times[order] = np.arange(len(documents)) - starts
    return times
