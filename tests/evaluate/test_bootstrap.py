import numpy as np
import pytest

from sbp_fast.evaluate import bootstrap
from sbp_fast.evaluate.bootstrap import interval, ratio, resample_sums


def test_resample_sums_counts_whole_rows_with_binomial_frequencies() -> None:
    """Columns are powers of ten, so the digits of each sum are the counts of the rows."""
    units = 6
    columns = np.stack([10.0 ** np.arange(units), np.ones(units)], axis=1)
    sums = resample_sums(columns, 500, seed=1)
    counts = np.array([[int(digit) for digit in f"{int(total):06d}"[::-1]] for total in sums[:, 0]])
    assert (counts.sum(1) == units).all() and (sums[:, 1] == units).all()
    assert abs(counts.mean() - 1) < 1e-12 and abs(counts.var() - (1 - 1 / units)) < 0.1  # binomial(n, 1/n)


def test_resample_sums_of_two_columns_share_the_resamples() -> None:
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 10, 400)  # far larger than the difference between the arms
    first, second = difficulty, difficulty + 0.1 + generator.normal(0, 0.1, 400)
    sums = resample_sums(np.stack([first, second, np.ones(400)], axis=1), 1000, seed=2)
    resampled = (sums[:, 1] - sums[:, 0]) / sums[:, 2]
    paired = interval(float((second - first).mean()), resampled, 0.95)
    assert 0.08 < paired["low"] < paired["value"] < paired["high"] < 0.12
    assert np.std(sums[:, 0] / sums[:, 2]) > 0.3


def test_interval_at_80_percent_covers_the_true_ratio_in_80_percent_of_cases() -> None:
    """A ratio of sums over documents of different size: 80% intervals over 300 repetitions (3 sigma: 0.07)."""
    generator = np.random.default_rng(3)
    covered = 0
    for repetition in range(300):
        size = generator.uniform(1, 3, 80)
        columns = np.stack([size * generator.normal(2.0, 0.5, 80), size], axis=1)
        bounds = interval(float(ratio(columns.sum(0))[0]), ratio(resample_sums(columns, 300, repetition))[:, 0], 0.8)
        covered += bounds["low"] <= 2.0 <= bounds["high"]
    assert abs(covered / 300 - 0.8) < 0.07


def test_resampled_ratio_has_the_quantiles_of_a_plain_loop() -> None:
    """Quantiles agree with those of a loop that resamples documents, up to the noise of resampling."""
    generator = np.random.default_rng(4)
    bits, size = generator.gamma(3, 200, 120), generator.gamma(5, 60, 120)
    loop = np.random.default_rng(5)
    plain = []
    for _ in range(4000):
        rows = loop.integers(120, size=120)
        plain.append(bits[rows].sum() / size[rows].sum())
    resampled = ratio(resample_sums(np.stack([bits, size], axis=1), 4000, seed=6))[:, 0]
    width = np.subtract(*np.quantile(plain, [0.975, 0.025]))
    for level in (0.025, 0.5, 0.975):
        assert abs(np.quantile(resampled, level) - np.quantile(plain, level)) < 0.06 * width


def test_resample_sums_depends_on_the_seed_and_not_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.random.default_rng(7).integers(-99, 99, (50, 3)).astype(np.float64)
    whole = resample_sums(columns, 40, seed=8)
    monkeypatch.setattr(bootstrap, "CHUNK_BYTES", 8 * 50 * 7)
    np.testing.assert_array_equal(resample_sums(columns, 40, seed=8), whole)
    assert (resample_sums(columns, 40, seed=9) != whole).any()
