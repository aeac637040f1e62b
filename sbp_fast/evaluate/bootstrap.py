"""Percentile bootstrap (Efron 1979) of ratios of sums; all columns share the resamples, so that differences are paired."""

from __future__ import annotations

import numpy as np

CHUNK_BYTES = 1 << 26


def resample_sums(columns: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Return the sums of each column over resamples of the rows.

    Args:
        columns: float64 [units, k]; a row holds the values of one resampled unit (a document, a question).
        samples: number of resamples, each of `units` rows sampled with replacement.
        seed: seed of the random generator.

    Returns:
        float64 [samples, k]; row i of every column comes from the same resample.
    """
    units = len(columns)
    generator = np.random.default_rng(seed)
    at_once = max(1, CHUNK_BYTES // (8 * units))
    sums = []
    for start in range(0, samples, at_once):
        # How often each row is in each resample, times the columns: the same sums as gathering the resampled rows. Not by
        # `@`, whose last bits depend on the number of threads.
        counts = generator.multinomial(units, np.full(units, 1 / units), min(at_once, samples - start))
        sums.append(np.einsum("su,uk->sk", counts.astype(np.float64), columns))
    return np.concatenate(sums)


def resample_pair_sums(columns: np.ndarray, first: np.ndarray, second: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Return the sums of each column over resamples of the documents that the rows are pairs of.

    Documents are resampled whole, and a pair counts as often as its two documents together: the product of their counts (Owen
    and Eckles 2012, "Bootstrapping data arrays of arbitrary order", Annals of Applied Statistics 6). So pairs that share a
    document, as seed or as partner, stay together, though the pairs may all be connected. The variance is right where what
    documents have in common dominates, and too large, up to three times, where every pair varies by itself.

    Args:
        columns: float64 [pairs, k].
        first: int64 [pairs], a document of each pair.
        second: int64 [pairs], the other one.
        samples: number of resamples.
        seed: seed of the random generator.

    Returns:
        float64 [samples, k]; row i of every column comes from the same resample. A resample may hold no pair: sums of zero.
    """
    _, indices = np.unique(np.concatenate([first, second]), return_inverse=True)
    units, (left, right) = indices.max() + 1, np.split(indices, 2)
    generator = np.random.default_rng(seed)
    at_once = max(1, CHUNK_BYTES // (8 * (units + len(columns))))
    sums = []
    for start in range(0, samples, at_once):
        counts = generator.multinomial(units, np.full(units, 1 / units), min(at_once, samples - start))
        sums.append(np.einsum("sp,pk->sk", (counts[:, left] * counts[:, right]).astype(np.float64), columns))
    return np.concatenate(sums)


def interval(value: float, resampled: np.ndarray, confidence: float) -> dict[str, float]:
    """Return `value` and the percentile interval of its bootstrap values `resampled` as {"value", "low", "high"}."""
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"value": float(value), "low": float(low), "high": float(high)}


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return [..., k] ratios of [..., 2k] sums: k numerators, followed by their k denominators."""
    numerators, denominators = np.split(sums, 2, axis=-1)
    return numerators / denominators
