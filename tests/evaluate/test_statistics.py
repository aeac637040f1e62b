"""Intervals over training runs and documents: simulated A/A comparisons, coverage, power, and invariances."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, stdtrit

from sbp_fast.evaluate.statistics import (
    ArmScores,
    arm_interval,
    difference_interval,
    document_half_width,
    estimate,
    half_width,
    run_half_width,
    share_bounds,
    share_interval,
)

COMPARISONS = 1000
DOCUMENTS = 200


def bits_per_byte(
    generator: np.random.Generator,
    runs: tuple[int, ...],
    effects: tuple[float, ...],
    run_sd: float,
    arm_document_sd: float = 0.03,
    interaction_sd: float = 0.03,
    comparisons: int = COMPARISONS,
) -> list[ArmScores]:
    """Simulated arms: documents of log-normal length, arms and runs vary, and each of these two by document."""
    lengths = generator.lognormal(6, 1, (comparisons, 1, DOCUMENTS))
    difficulty = generator.normal(2, 0.3, (comparisons, 1, DOCUMENTS))
    arms = []
    for count, effect in zip(runs, effects, strict=True):
        own = generator.normal(0, arm_document_sd, (comparisons, 1, DOCUMENTS))
        run = generator.normal(0, run_sd, (comparisons, count, 1))
        rest = generator.normal(0, interaction_sd, (comparisons, count, DOCUMENTS))
        rates = difficulty + own + run + rest + effect
        arms.append(ArmScores.from_sums(lengths * rates, np.broadcast_to(lengths, rates.shape)))
    return arms


def accuracies(generator: np.random.Generator, runs: tuple[int, ...], run_sd: float) -> list[ArmScores]:
    """Simulated arms whose answers to questions are right or wrong, by the question's difficulty and the run's ability."""
    difficulty = generator.normal(-0.5, 1.5, (COMPARISONS, 1, DOCUMENTS))
    arms = []
    for count in runs:
        ability = generator.normal(0, run_sd, (COMPARISONS, count, 1))
        right = generator.random((COMPARISONS, count, DOCUMENTS)) < expit(difficulty + ability)
        arms.append(ArmScores.from_sums(right.astype(float), np.ones(right.shape)))
    return arms


def share_that_excludes_zero(arms: list[ArmScores]) -> float:
    terms = [(1, arms[1]), (-1, arms[0])]
    return float((np.abs(estimate(terms)) > half_width(terms, 0.95)).mean())


@pytest.mark.parametrize("run_sd", [0.003, 0.01, 0.05])
@pytest.mark.parametrize("runs", [(2, 2), (3, 3), (5, 5), (2, 5)])
def test_equal_arms_of_ratio_metrics_are_called_different_in_at_most_5_percent(runs: tuple[int, ...], run_sd: float) -> None:
    arms = bits_per_byte(np.random.default_rng(0), runs, (0, 0), run_sd)
    assert share_that_excludes_zero(arms) <= 0.05


@pytest.mark.parametrize("run_sd", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("runs", [(2, 2), (3, 3), (5, 5), (2, 5)])
def test_equal_arms_of_accuracies_are_called_different_in_at_most_5_percent(runs: tuple[int, ...], run_sd: float) -> None:
    assert share_that_excludes_zero(accuracies(np.random.default_rng(0), runs, run_sd)) <= 0.05


@pytest.mark.parametrize("document_share", [0, 0.05, 0.2, 1, 5])
@pytest.mark.parametrize("varying", [1, 2])
@pytest.mark.parametrize("runs", [2, 3, 5])
def test_interval_of_two_components_is_long_enough_at_every_ratio_of_them(
    runs: int, varying: int, document_share: float
) -> None:
    """Runs of one or both arms vary, documents vary by a multiple of that: 100,000 comparisons (3 sigma: 0.2%).

    A single t with Satterthwaite's degrees of freedom over both components excludes zero in up to 12.7% of these.
    """
    generator, comparisons = np.random.default_rng(1), 100_000
    run_values = generator.normal(0, 1, (2, comparisons, runs)) * np.array([1, varying - 1])[:, None, None]
    variance = document_share * varying / runs
    influences = np.sqrt(variance / (DOCUMENTS - 1)) * np.tile([1.0, -1.0], DOCUMENTS // 2)
    arms = [ArmScores(run_values[0], influences[None]), ArmScores(run_values[1], np.zeros((1, DOCUMENTS)))]
    terms = [(1, arms[1]), (-1, arms[0])]
    difference = estimate(terms) + np.sqrt(variance) * generator.normal(0, 1, comparisons)
    assert (np.abs(difference) > half_width(terms, 0.95)).mean() <= 0.05 + 0.002


def test_equal_arms_of_2_and_10_runs_are_called_different_in_at_most_5_percent() -> None:
    """Runs alone vary: 100,000 comparisons (3 sigma: 0.2%). Welch's degrees of freedom without a limit give 5.9%."""
    generator, comparisons = np.random.default_rng(7), 100_000
    arms = [ArmScores(generator.normal(0, 1, (comparisons, runs)), np.zeros((1, DOCUMENTS))) for runs in (2, 10)]
    assert share_that_excludes_zero(arms) <= 0.05


@pytest.mark.parametrize("runs", [(2, 2), (3, 3), (5, 5), (3, 5)])
def test_interval_of_a_true_difference_covers_it_in_95_percent(runs: tuple[int, ...]) -> None:
    baseline, arm = bits_per_byte(np.random.default_rng(2), runs, (0, -0.08), run_sd=0.02)
    terms = [(1, arm), (-1, baseline)]
    assert (np.abs(estimate(terms) + 0.08) <= half_width(terms, 0.95)).mean() >= 0.95


@pytest.mark.parametrize(("runs", "standard_deviations"), [(2, 16), (3, 5), (5, 3)])
def test_difference_of_several_run_standard_deviations_is_found_in_90_percent(runs: int, standard_deviations: int) -> None:
    arms = bits_per_byte(np.random.default_rng(3), (runs, runs), (0, -0.02 * standard_deviations), run_sd=0.02)
    assert share_that_excludes_zero(arms) >= 0.9


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_interval_of_an_arms_value_covers_it_in_95_percent(runs: int) -> None:
    """The value's expectation is 2: the mean difficulty of documents, whose lengths are independent of it."""
    (arm,) = bits_per_byte(np.random.default_rng(4), (runs,), (0,), run_sd=0.02)
    assert (np.abs(arm.value - 2) <= half_width([(1, arm)], 0.95)).mean() >= 0.95


def test_document_interval_of_a_single_run_covers_its_expectation_in_95_percent() -> None:
    """One run's ratio over documents of very different lengths, in 4,000 samples (3 sigma: 1.0%)."""
    (arm,) = bits_per_byte(np.random.default_rng(5), (1,), (0,), run_sd=0.0, comparisons=4000)
    covered = (np.abs(arm.value - 2) <= document_half_width([(1, arm)], 0.95)).mean()
    assert abs(covered - 0.95) <= 0.01


@pytest.mark.parametrize("share", [-0.5, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("runs", [(2, 2, 2), (3, 3, 3), (5, 5, 5), (5, 3, 2)])
def test_interval_of_a_share_covers_it_in_95_percent(runs: tuple[int, ...], share: float) -> None:
    effects = (0, -0.3 * share, -0.3)
    baseline, arm, oracle = bits_per_byte(np.random.default_rng(6), runs, effects, run_sd=0.01)
    _, low, high = share_bounds(arm, oracle, baseline, 0.95)
    given = np.isfinite(low) & np.isfinite(high)
    assert given.mean() > 0.9
    assert ((low <= share) & (share <= high))[given].mean() >= 0.95


def one(values: Any, denominators: Any = None) -> ArmScores:
    numerators = np.asarray(values, float)
    return ArmScores.from_sums(
        numerators, np.ones(numerators.shape) if denominators is None else np.asarray(denominators, float)
    )


def test_half_widths_equal_the_formulas_computed_by_hand() -> None:
    """Two runs of two arms on three documents of lengths 1, 2 and 5."""
    lengths = np.array([1.0, 2, 5])
    first, second = np.array([[1.0, 3, 9], [2, 3, 10]]), np.array([[2.0, 2, 9], [1, 4, 12]])
    a, b = (one(sums, np.broadcast_to(lengths, sums.shape)) for sums in (first, second))
    ratios = [13 / 8, 15 / 8], [13 / 8, 17 / 8]
    np.testing.assert_allclose(np.stack([a.run_values, b.run_values]), ratios)
    variances = np.var(ratios, axis=1, ddof=1) / 2
    freedom = variances.sum() ** 2 / (variances**2).sum()
    without = [
        [np.mean(np.delete(sums, i, 1).sum(1) / np.delete(lengths, i).sum()) for i in range(3)] for sums in (first, second)
    ]
    jackknife = np.var(np.subtract(*without)) * 2
    over_runs = stdtrit(freedom, 0.95) * np.sqrt(variances.sum())
    over_documents = stdtrit(2, 0.95) * np.sqrt(jackknife)
    interval = difference_interval(a, b, 0.9)
    assert interval["value"] == pytest.approx(-1 / 8) and interval["runs"] == [2, 2]
    assert interval["high"] - interval["value"] == pytest.approx(np.hypot(over_runs, over_documents), rel=1e-12)


def test_difference_with_a_single_run_has_no_interval() -> None:
    several, single = one([[1, 2, 3], [2, 3, 5]]), one([[1, 2, 4]])
    assert difference_interval(single, single, 0.95) == {"value": 0.0, "low": None, "high": None, "runs": [1, 1]}
    assert difference_interval(several, single, 0.95)["low"] is None
    assert difference_interval(single, several, 0.95)["runs"] == [1, 2]


def test_value_of_a_single_run_has_an_interval_over_documents_and_says_so() -> None:
    single, several = arm_interval(one([[1, 2, 4]]), 0.95), arm_interval(one([[1, 2, 4], [1, 2, 3]]), 0.95)
    assert single["over"] == "documents" and single["runs"] == 1 and single["low"] < single["value"] < single["high"]
    assert several["over"] == "runs and documents" and several["run_values"] == [pytest.approx(7 / 3), 2]


def test_single_document_gives_no_interval() -> None:
    arm = one([[3.0], [4.0]], [[2.0], [2.0]])
    assert arm_interval(arm, 0.95)["low"] is None and arm_interval(arm, 0.95)["value"] == 1.75
    assert difference_interval(arm, arm, 0.95) == {"value": 0, "low": None, "high": None, "runs": [2, 2]}


def test_runs_of_equal_values_leave_the_interval_over_documents() -> None:
    arm, other = one([[1, 2, 4, 4]] * 2), one([[1, 3, 4, 5]] * 2)
    terms = [(1, arm), (-1, other)]
    assert run_half_width(terms, 0.95) == 0
    assert half_width(terms, 0.95) == document_half_width(terms, 0.95) > 0


def shifted(base: np.ndarray, by: float, spread: float) -> ArmScores:
    """Three runs that differ by `spread`, and from `base` by `by`."""
    return one(base + by + spread * np.array([[-1], [0], [1]]))


def test_share_is_null_with_the_reason_where_it_would_mean_nothing() -> None:
    base = np.random.default_rng(0).normal(2, 0.2, 50)
    baseline, arm, oracle = shifted(base, 0, 0.001), shifted(base, -0.02, 0.001), shifted(base, -0.1, 0.001)
    share = share_interval(arm, oracle, baseline, "lower", 0.95)
    assert share["value"] == pytest.approx(0.2) and share["low"] < 0.2 < share["high"]
    assert share_interval(arm, oracle, baseline, "higher", 0.95)["reason"] == "the oracle itself did worse than the baseline"
    assert share_interval(arm, baseline, oracle, "lower", 0.95)["reason"] == "the oracle itself did worse than the baseline"
    unclear = share_interval(arm, shifted(base, -0.1, 0.1), baseline, "lower", 0.95)
    assert unclear == {"value": None, "reason": "the oracle's own gain is not distinguishable from zero"}
    single = share_interval(arm, one(base[None] - 0.1), baseline, "lower", 0.95)
    assert single == {"value": None, "reason": "an arm that it involves was trained once"}


def test_share_of_the_oracle_itself_is_one_with_the_uncertainty_of_its_runs() -> None:
    base = np.random.default_rng(0).normal(2, 0.2, 50)
    oracle = shifted(base, -0.1, 0.001)
    share = share_interval(oracle, oracle, shifted(base, 0, 0.001), "lower", 0.95)
    assert share["value"] == 1 and 0.9 < share["low"] < 1 < share["high"] < 1.1


def sums(draw: Any, runs: int, documents: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = generator.lognormal(5, 1, documents)
    return lengths * generator.normal(2, 0.5, (runs, documents)), np.broadcast_to(lengths, (runs, documents))


@st.composite
def two_arms(draw: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    documents = draw(st.integers(2, 12))
    return [sums(draw, draw(st.integers(2, 4)), documents) for _ in range(2)]


def difference(arms: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return value, low end and high end, of an interval that is no point: NaN and zero would equal themselves below."""
    interval = difference_interval(ArmScores.from_sums(*arms[0]), ArmScores.from_sums(*arms[1]), 0.95)
    ends = np.array([interval["value"], interval["low"], interval["high"]])
    assert ends[1] < ends[0] < ends[2]
    return ends


def assert_equal_but_for_rounding(ends: np.ndarray, expected: np.ndarray, largest: float) -> None:
    """Assert that ends differ by rounding errors of sums whose terms are at most `largest`, however wide the interval."""
    width = expected[2] - expected[1]
    assert np.abs(ends - expected).max() <= 1e3 * np.finfo(float).eps * (largest + width)


@settings(deadline=None)
@given(two_arms())
def test_swapped_arms_flip_the_interval(arms: list[tuple[np.ndarray, np.ndarray]]) -> None:
    value, low, high = difference(arms)
    assert difference(arms[::-1]).tolist() == [-value, -high, -low]  # sums of two terms commute exactly


@settings(deadline=None)
@given(two_arms(), st.integers(-20, 20))
def test_scaled_numerators_scale_the_interval(arms: list[tuple[np.ndarray, np.ndarray]], exponent: int) -> None:
    scale = 2.0**exponent  # without rounding
    scaled = [(numerators * scale, denominators) for numerators, denominators in arms]
    assert difference(scaled).tolist() == (scale * difference(arms)).tolist()


@settings(deadline=None)
@given(two_arms(), st.floats(-10, 10))
def test_constant_added_to_one_arms_ratios_moves_the_interval(
    arms: list[tuple[np.ndarray, np.ndarray]], constant: float
) -> None:
    (numerators, denominators), other = arms
    moved = difference([(numerators + constant * denominators, denominators), other])
    assert_equal_but_for_rounding(moved, difference(arms) + constant, largest=20)


@settings(deadline=None)
@given(two_arms(), st.integers(0, 2**32))
def test_order_of_runs_and_documents_does_not_change_the_interval(arms: list[tuple[np.ndarray, np.ndarray]], seed: int) -> None:
    generator = np.random.default_rng(seed)
    documents = generator.permutation(arms[0][0].shape[1])
    shuffled = []
    for numerators, denominators in arms:
        rows = generator.permutation(len(numerators))[:, None]
        shuffled.append((numerators[rows, documents], denominators[rows, documents]))
    assert_equal_but_for_rounding(difference(shuffled), difference(arms), largest=10)
