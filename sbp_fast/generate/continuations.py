"""The most probable continuations of prompts, token by token, as models answer questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sbp_fast.generate.decoder import KVCacheConfig, SamplingParams
from sbp_fast.generate.engine import Engine, GenerationResult, Seed
from sbp_fast.model.transformer import Transformer

ROWS = 64
"""Prompts continued at once."""


def continue_prompts(
    model: Transformer, prompts: Sequence[np.ndarray], sampling: SamplingParams, advance: Callable[[int], None]
) -> list[GenerationResult]:
    """Return the greedy continuation of each prompt, in the order of the prompts.

    A prompt is the engine's seed but for its last token, which the continuation begins with in place of `sampling.first`. A
    continuation does not depend on the other prompts.

    Args:
        model: the model; its weights are whole.
        prompts: int [tokens] each, two tokens or more; at least one prompt.
        sampling: stop rules and forbidden tokens; its temperature is 0.
        advance: called with the number of tokens of each finished prompt and its continuation.
    """
    if sampling.temperature:
        raise ValueError("continuations are greedy: the temperature is 0")
    longest = max(map(len, prompts)) - 1
    precision = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    cache = KVCacheConfig.for_rows(min(ROWS, len(prompts)), longest, sampling.maximum_tokens, precision)
    engine = Engine(model, sampling, cache, run_seed=0, graphs=False)
    seeds = (Seed(number, number, prompt[:-1], (0,), int(prompt[-1])) for number, prompt in enumerate(prompts))
    results: dict[int, GenerationResult] = {}
    for result in engine.generate(seeds):
        results[result.seed] = result
        advance(len(prompts[result.seed]) + result.generated_tokens)
    return [results[number] for number in range(len(prompts))]
