"""Arms compared by their scores: values, differences to the baseline, and shares of an oracle's gain, with intervals.

Intervals are percentile bootstraps over items; all arms share the resamples, so that differences are paired. For an arm that
was trained several times, each item has the mean of its runs. The intervals do not cover the variation between trainings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sbp_fast.config import CompareConfig
from sbp_fast.evaluate.bootstrap import interval, ratio, resample_sums

Scores = Mapping[str, Sequence[pa.Table]]


def compare_scores(
    scores: Scores, metrics: Mapping[str, Mapping[str, Any]], oracles: Sequence[str], config: CompareConfig, seed: int
) -> dict[str, Any]:
    """Return each arm's metrics, its differences to the first arm, and its share of each oracle's gain.

    Args:
        scores: arm -> score tables of its training runs; the first arm is the baseline.
        metrics: metric -> its description (`Metric.describe`).
        oracles: arms that read more real text, whose gain over the baseline others may recover.
        config: number of resamples and confidence of the intervals.
        seed: seed of the bootstrap.
    """
    baseline, *others = scores
    arms: dict[str, dict[str, Any]] = {arm: {} for arm in scores}
    differences: dict[str, dict[str, Any]] = {arm: {} for arm in others}
    recovered: dict[str, Any] = {oracle: {arm: {} for arm in others if arm not in oracles} for oracle in oracles}
    for metric, description in metrics.items():
        items = {arm: _items_of(tables, metric) for arm, tables in scores.items()}
        values, resampled = _bootstrap(list(items.values()), config, seed)
        for column, (arm, item) in enumerate(items.items()):
            arms[arm][metric] = interval(values[column], resampled[:, column], config.confidence)
            arms[arm][metric] |= {description["unit"]: item.num_rows, "by_source": _by_source(item, config, seed)}
            if description["chance"] is not None:
                arms[arm][metric]["chance"] = description["chance"]
            if arm != baseline:
                change = values[column] - values[0]
                differences[arm][metric] = interval(change, resampled[:, column] - resampled[:, 0], config.confidence)
        sign = -1 if description["better"] == "lower" else 1
        columns = {arm: column for column, arm in enumerate(items)}
        for oracle, by_arm in recovered.items():
            for arm, by_metric in by_arm.items():
                chosen = [0, columns[arm], columns[oracle]]
                by_metric[metric] = recovered_share(sign * values[chosen], sign * resampled[:, chosen], config.confidence)
    return {
        "metrics": {name: dict(description) for name, description in metrics.items()},
        "arms": arms,
        "differences": differences,
        "recovered_share_of_oracle": recovered,
        "confidence": config.confidence,
        "bootstrap_samples": config.bootstrap_samples,
    }


def recovered_share(values: np.ndarray, resampled: np.ndarray, confidence: float) -> dict[str, Any]:
    """Return an arm's gain over the baseline as a share of the oracle's, or null where the oracle has not clearly gained.

    Args:
        values: float64 [3], baseline, arm and oracle; higher is better.
        resampled: float64 [samples, 3], their bootstrap values.
        confidence: coverage of the interval.
    """
    gain = interval(values[2] - values[0], resampled[:, 2] - resampled[:, 0], confidence)
    if gain["high"] < 0:
        return {"value": None, "reason": "the oracle itself did worse than the baseline"}
    if gain["low"] <= 0:
        return {"value": None, "reason": "the oracle's own gain is not distinguishable from zero"}
    share = (resampled[:, 1] - resampled[:, 0]) / (resampled[:, 2] - resampled[:, 0])
    return interval((values[1] - values[0]) / (values[2] - values[0]), share, confidence)


def _items_of(tables: Sequence[pa.Table], metric: str) -> pa.Table:
    """Return the rows of one metric, averaged over training runs."""
    rows = [table.filter(np.array(table["metric"].to_pylist()) == metric) for table in tables]
    if len(rows) == 1:
        return rows[0]
    if any(run["id"] != rows[0]["id"] for run in rows):
        raise ValueError(f"training runs of one arm were scored on different items of {metric}")
    means = {name: np.mean([run[name].to_numpy() for run in rows], axis=0) for name in ("numerator", "denominator")}
    return pa.table({"source": rows[0]["source"], **means})


def _bootstrap(items: Sequence[pa.Table], config: CompareConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ratio of every arm [arms], and of its resamples [samples, arms]; all arms share the resamples."""
    columns = np.stack([item[name].to_numpy() for name in ("numerator", "denominator") for item in items], axis=1)
    sums = resample_sums(columns, config.bootstrap_samples, seed)
    return ratio(columns.sum(0)), ratio(sums)


def _by_source(item: pa.Table, config: CompareConfig, seed: int) -> dict[str, Any]:
    sources = np.array(item["source"].to_pylist())
    by_source = {}
    for source in sorted(set(sources.tolist())):
        part = item.filter(sources == source)
        values, resampled = _bootstrap([part], config, seed)
        by_source[source] = interval(values[0], resampled[:, 0], config.confidence) | {"items": part.num_rows}
    return by_source
