"""Arms compared by their scores: values, differences to the baseline, and shares of an oracle's gain, with intervals.

`evaluate.statistics` says how intervals are computed: over training runs and documents where an arm has more than one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sbp_fast.errors import UserError
from sbp_fast.evaluate.statistics import ArmScores, arm_interval, difference_interval, share_interval

Scores = Mapping[str, Sequence[pa.Table]]


def compare_scores(
    scores: Scores, metrics: Mapping[str, Mapping[str, Any]], oracles: Sequence[str], confidence: float
) -> dict[str, Any]:
    """Return each arm's metrics, its differences to the first arm and to each other arm, and its share of each oracle's gain.

    Args:
        scores: arm -> score tables of its training runs; the first arm is the baseline.
        metrics: metric -> its description (`Metric.describe`).
        oracles: arms that read more real text, whose gain over the baseline others may recover.
        confidence: coverage of the intervals.

    Raises:
        UserError: two training runs were scored on different items.
    """
    baseline, *others = scores
    arms: dict[str, dict[str, Any]] = {arm: {} for arm in scores}
    differences: dict[str, dict[str, Any]] = {arm: {} for arm in others}
    pairwise: dict[str, Any] = {arm: {other: {} for other in others if other != arm} for arm in others}
    recovered: dict[str, Any] = {oracle: {arm: {} for arm in others if arm not in oracles} for oracle in oracles}
    for metric, description in metrics.items():
        sums = _run_sums(scores, metric)
        measured = {arm: arm_sums.scores() for arm, arm_sums in sums.items()}
        for arm, arm_sums in sums.items():
            by_source = _by_source(arm_sums, confidence)
            arms[arm][metric] = arm_interval(measured[arm], confidence)
            arms[arm][metric] |= {description["unit"]: len(arm_sums.sources), "by_source": by_source}
            if description["chance"] is not None:
                arms[arm][metric]["chance"] = description["chance"]
        for arm in others:
            differences[arm][metric] = difference_interval(measured[arm], measured[baseline], confidence)
            for other, by_metric in pairwise[arm].items():
                by_metric[metric] = difference_interval(measured[arm], measured[other], confidence)
        for oracle, by_arm in recovered.items():
            for arm, by_metric in by_arm.items():
                three = (measured[arm], measured[oracle], measured[baseline])
                by_metric[metric] = share_interval(*three, description["better"], confidence)
    return {
        "metrics": {name: dict(description) for name, description in metrics.items()},
        "arms": arms,
        "differences": differences,
        "pairwise": pairwise,
        "recovered_share_of_oracle": recovered,
        "confidence": confidence,
    }


@dataclass(frozen=True)
class _RunSums:
    """What each item adds to a metric's two sums in each run of an arm.

    Attributes:
        sources: source of each item.
        numerators: float64 [runs, items].
        denominators: float64 [runs, items].
    """

    sources: np.ndarray
    numerators: np.ndarray
    denominators: np.ndarray

    def scores(self, chosen: np.ndarray | slice = slice(None)) -> ArmScores:
        """Return the scores on the chosen items, by default all."""
        return ArmScores.from_sums(self.numerators[:, chosen], self.denominators[:, chosen])


def _run_sums(scores: Scores, metric: str) -> dict[str, _RunSums]:
    """Return the sums of each arm by one metric, whose items must be the same in every run of every arm."""
    rows = {
        arm: [table.filter(np.array(table["metric"].to_pylist()) == metric) for table in tables]
        for arm, tables in scores.items()
    }
    first = next(iter(rows))
    ids = rows[first][0]["id"]
    for arm, runs in rows.items():
        if any(run["id"] != ids for run in runs):
            message = f"has a training run scored on other items of {metric} than the first run of {first}"
            raise UserError(f"arm {arm}", message, "evaluate all models on the same corpus and questions")
    sources = np.array(rows[first][0]["source"].to_pylist())
    return {
        arm: _RunSums(sources, *(np.stack([run[name].to_numpy() for run in runs]) for name in ("numerator", "denominator")))
        for arm, runs in rows.items()
    }


def _by_source(sums: _RunSums, confidence: float) -> dict[str, Any]:
    by_source = {}
    for source in sorted(set(sums.sources.tolist())):
        chosen = np.flatnonzero(sums.sources == source)
        by_source[source] = arm_interval(sums.scores(chosen), confidence) | {"items": len(chosen)}
    return by_source
