"""Where a document that another library drew is over, so that it means what one of our engine's does."""

from __future__ import annotations

import numpy as np

from sbp_fast.generate.decoder import SamplingRule
from sbp_fast.generate.engine import Draft


def make_draft(seed: int, sample: int, drawn: np.ndarray, nats: np.ndarray, rule: SamplingRule) -> Draft:
    """The document in what was drawn after a seed.

    Args:
        seed: number of the seed.
        sample: number of the document among its seed's.
        drawn: int [tokens], at most `rule.maximum_tokens`; what follows an end token counts for nothing.
        nats: float [tokens], the log-probability of each.
    """
    count, stop = cut(drawn, rule.end, rule.repeated_tokens)
    tokens = drawn[: count - (stop == "end")].astype(np.int32)
    return Draft(seed, sample, tokens, stop, float(nats[:count].sum(dtype=np.float64)))


def cut(drawn: np.ndarray, end: int, repeated_tokens: int) -> tuple[int, str]:
    """How many of the drawn tokens a document has, its end token included, and why it is over after them."""
    ends = np.flatnonzero(drawn == end)
    text = drawn[: ends[0]] if len(ends) else drawn
    repeated = first_repetition(text, repeated_tokens)
    if repeated:
        return repeated, "repetition"
    return (len(text) + 1, "end") if len(ends) else (len(text), "length")


def first_repetition(tokens: np.ndarray, width: int) -> int:
    """The least number of tokens the last `width` of which have occurred among them before; 0 if there is none."""
    seen: set[bytes] = set()
    for stop in range(width, len(tokens) + 1) if width else ():
        run = tokens[stop - width : stop].tobytes()
        if run in seen:
            return stop
        seen.add(run)
    return 0
