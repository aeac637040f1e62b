"""The engine's stop rules, applied to the output of other backends, so that a document's stop means the same everywhere."""

from __future__ import annotations

import numpy as np

from sbp_fast.generate.decoder import SamplingParams
from sbp_fast.generate.engine import GenerationResult


def truncated_result(
    seed: int, sample: int, generated: np.ndarray, nats: np.ndarray, sampling: SamplingParams
) -> GenerationResult:
    """Return the document in the tokens that another backend generated after a seed.

    Args:
        seed: number of the seed.
        sample: number of the document among its seed's.
        generated: int [tokens], at most `sampling.maximum_tokens`; tokens after an end token are ignored.
        nats: float [tokens], the log-probability of each.
        sampling: with the stop rules.
    """
    count, stop = truncate(generated, sampling.end, sampling.repeated_tokens)
    tokens = generated[: count - (stop == "end")].astype(np.int32)
    return GenerationResult(seed, sample, tokens, stop, float(nats[:count].sum(dtype=np.float64)))


def truncate(generated: np.ndarray, end: int, repeated_tokens: int) -> tuple[int, str]:
    """Return how many of the generated tokens belong to the document, its end token included, and why it stops there."""
    ends = np.flatnonzero(generated == end)
    text = generated[: ends[0]] if len(ends) else generated
    repeated = first_repetition(text, repeated_tokens)
    if repeated:
        return repeated, "repetition"
    return (len(text) + 1, "end") if len(ends) else (len(text), "length")


def first_repetition(tokens: np.ndarray, width: int) -> int:
    """Return the length of the shortest prefix whose last `width` tokens have occurred in it before; 0 if there is none."""
    seen: set[bytes] = set()
    for stop in range(width, len(tokens) + 1) if width else ():
        run = tokens[stop - width : stop].tobytes()
        if run in seen:
            return stop
        seen.add(run)
    return 0
