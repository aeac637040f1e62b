"""Percentile bootstrap (Efron 1979) of ratios of sums, the same resamples for every column so that differences are paired."""

from __future__ import annotations

import numpy as np

CHUNK_BYTES = 1 << 26


def resample_sums(columns: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Sums of each column over resamples of the rows.

    Args:
        columns: float64 [units, k]; a row is what is drawn (a document, a question) with all that is known of it.
        samples: resamples, each of as many rows as there are, drawn with replacement.

    Returns:
        float64 [samples, k]; row i of every column comes from the same resample.
    """
    units = len(columns)
    generator = np.random.default_rng(seed)
    at_once = max(1, CHUNK_BYTES // (8 * units))
    sums = []
    for start in range(0, samples, at_once):
        drawn = generator.multinomial(units, np.full(units, 1 / units), min(at_once, samples - start))
        # how often each row is drawn, times the columns: the same sums as gathering the drawn rows. Not by `@`, whose last
        # bits depend on the number of threads
        sums.append(np.einsum("su,uk->sk", drawn.astype(np.float64), columns))
    return np.concatenate(sums)


def interval(value: float, draws: np.ndarray, confidence: float) -> dict[str, float]:
    """`value` and the percentile interval of its bootstrap `draws` as {"value", "low", "high"}."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"value": float(value), "low": float(low), "high": float(high)}


def ratio(sums: np.ndarray) -> np.ndarray:
    """[..., 2k] sums, k numerators and then their k denominators, as [..., k] ratios."""
    numerators, denominators = np.split(sums, 2, axis=-1)
    return numerators / denominators
