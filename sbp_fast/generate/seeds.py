"""The choice of seed documents, their order, and the numbers of their samples: a function of settings and corpus alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from sbp_fast.config import RunConfig
from sbp_fast.config.synthesize import NO_SEEDS
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.registry import Registry

SeedSampler: TypeAlias = Callable[[np.ndarray, int, int], np.ndarray]
"""(int64 [documents], tokens of each document; number of seeds; run's seed) -> int64 [seeds], indices of documents or
`NO_SEED`."""
SEED_SAMPLERS = Registry[SeedSampler]("seed sampler")
"""What `synthesize.seeds` may name."""


NO_SEED = -1
"""In place of a seed's index, for documents that are generated after none."""


@dataclass(frozen=True)
class SeedPlan:
    """The seeds of a run, grouped into shards that are finished one by one.

    Attributes:
        documents: int64 [seeds], indices into the unique corpus, or all of them NO_SEED.
        first_samples: int64 [seeds], number of the first of the `samples` documents generated after each seed.
        samples: documents for each seed.
        shard_seeds: seeds of a shard.
    """

    documents: np.ndarray
    first_samples: np.ndarray
    samples: int
    shard_seeds: int

    @staticmethod
    def make(config: RunConfig, unique: Corpus, context: int) -> SeedPlan:
        """Choose enough seeds for the tokens wanted, assuming that synthetic documents are as long as real ones.

        Raises:
            UserError: a seed sampler that is not registered.
        """
        wanted = config.synthesize.oversample * wanted_tokens(config)
        lengths = np.minimum(np.diff(unique.offsets), context)
        samples = config.synthesize.samples_per_seed
        count = max(1, math.ceil(wanted / float(lengths.mean()) / samples))
        documents = SEED_SAMPLERS[config.synthesize.seeds](lengths, count, config.seed)
        return SeedPlan(documents, earlier_occurrences(documents) * samples, samples, config.synthesize.shard_seeds)

    @cached_property
    def shards(self) -> list[range]:
        """The seeds of each shard."""
        seeds = len(self.documents)
        return [range(start, min(start + self.shard_seeds, seeds)) for start in range(0, seeds, self.shard_seeds)]

    def sample_numbers(self, seed: int) -> tuple[int, ...]:
        """Return the numbers of the samples of a seed; when a document is a seed again, its numbers continue."""
        first = int(self.first_samples[seed])
        return tuple(range(first, first + self.samples))


def wanted_tokens(config: RunConfig) -> float:
    """Return the synthetic tokens that the arm with the most of them reads.

    Raises:
        UserError: no arm reads synthetic documents.
    """
    arms = [arm for arm in config.enabled_arms.values() if arm.synthetic]
    if not arms:
        raise UserError("arms", "none of them reads synthetic documents", 'give one of them synthetic = "related"')
    return max(arm.share * arm.resolve_recipe(config.pretrain).tokens for arm in arms)


def uniform(lengths: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose every document equally often: without replacement until each was chosen, then again in another order.

    The paper samples seeds uniformly (arXiv 2509.15248, section 2.3); without replacement none is left out by chance.
    """
    rounds = -(-count // len(lengths))
    orders = [np.random.default_rng([seed, number]).permutation(len(lengths)) for number in range(rounds)]
    return np.concatenate(orders)[:count]


def by_length(lengths: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose documents in proportion to their tokens, so that every token of the corpus is in a seed equally often.

    Systematic sampling: each document is chosen as often as expected, rounded up or down; then all are shuffled.
    """
    generator = np.random.default_rng([seed, 0])
    ends = np.cumsum(lengths, dtype=np.float64) / lengths.sum() * count
    return generator.permutation(
        np.searchsorted(ends, np.arange(count) + generator.random(), "right").clip(max=len(lengths) - 1)
    )


def no_seeds(lengths: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose no document: what is generated follows nothing, as samples of the model's own distribution."""
    return np.full(count, NO_SEED)


SEED_SAMPLERS.register("uniform", uniform)
SEED_SAMPLERS.register("length", by_length)
SEED_SAMPLERS.register(NO_SEEDS, no_seeds)


def earlier_occurrences(documents: np.ndarray) -> np.ndarray:
    """Return how often each entry's document occurs before it; int64 [seeds]."""
    order = np.argsort(documents, kind="stable")
    ordered = documents[order]
    starts = np.searchsorted(ordered, ordered, "left")
    counts = np.empty(len(documents), np.int64)
    counts[order] = np.arange(len(documents)) - starts
    return counts
