"""A few documents of a model, to be read by people: while it is trained, or by the command `sample`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sbp_fast.generate.decoder import KVCacheConfig, SamplingParams
from sbp_fast.generate.engine import Engine, GenerationResult, Seed
from sbp_fast.model.transformer import Transformer


def generate_samples(
    model: Transformer, sampling: SamplingParams, seeds: Mapping[int, np.ndarray], run_seed: int
) -> list[GenerationResult]:
    """Return one document after each seed, in the order of the seeds.

    Args:
        model: the model; its weights are whole.
        sampling: how tokens are sampled.
        seeds: key of a document's random numbers -> int [tokens] of its seed, empty for a document without one. At least one.
        run_seed: key of the random numbers.
    """
    longest = max(1, *map(len, seeds.values()))
    precision = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    cache = KVCacheConfig.for_rows(len(seeds), longest, sampling.maximum_tokens, precision)
    engine = Engine(model, sampling, cache, run_seed, graphs=False)
    waiting = [Seed(number, document, tokens, (0,)) for number, (document, tokens) in enumerate(seeds.items())]
    return sorted(engine.generate(waiting), key=lambda result: result.seed)
