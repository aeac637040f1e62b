"""The table that a finished run leaves in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from sbp_fast.experiment.report import wording
from sbp_fast.experiment.report.plots import LABELS
from sbp_fast.pipeline.progress import short

STYLES = {"better": "green", "worse": "red"}


def summary_table(results: Mapping[str, Any]) -> Table:
    """The arms side by side, each metric with its interval and its change against the baseline."""
    table = Table(title=wording.verdict(results), title_justify="left", title_style="bold")
    table.add_column("")
    arms = results["arms"]
    for arm in arms:
        table.add_column(LABELS[arm], justify="right")
    table.add_row("training tokens", *(short(arm["tokens"]) for arm in arms.values()))
    table.add_row("of them synthetic", *(short(arm["synthetic_tokens"]) for arm in arms.values()))
    table.add_row("FLOPs in all", *(f"{arm['total_flops']:.2e}" for arm in arms.values()))
    for metric in wording.metric_names(results):
        unit = ", %" if metric.endswith("_accuracy") else ""
        table.add_row(f"{wording.metric_label(metric)}{unit}", *(_measure(arm[metric], metric) for arm in arms.values()))
        table.add_row(
            "change to baseline", *(_change(arm["difference_to_baseline"].get(metric), metric) for arm in arms.values())
        )
    return table


def _measure(found: Mapping[str, Any], metric: str, signed: bool = False) -> str:
    value, low, high = (wording.number(found[key], metric, signed) for key in ("value", "low", "high"))
    return f"{value}\n[{low}, {high}]"


def _change(found: Mapping[str, Any] | None, metric: str) -> Text:
    if found is None:
        return Text("")
    kind = "unclear" if not wording.excludes_zero(found) else "better" if wording.is_better(found, metric) else "worse"
    return Text(_measure(found, metric, signed=True), STYLES.get(kind, ""))
