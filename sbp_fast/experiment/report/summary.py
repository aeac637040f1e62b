"""The table that a finished run prints in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from sbp_fast.experiment.report import wording
from sbp_fast.pipeline.progress import short

STYLES = {"better": "green", "worse": "red", "unclear": ""}


def summary_table(results: Mapping[str, Any]) -> Table:
    """Return the arms side by side, each metric with its interval and its change against the baseline."""
    table = Table(title=wording.verdict(results), title_justify="left", title_style="bold")
    table.add_column("")
    arms = results["arms"].values()
    for arm in arms:
        table.add_column(arm["label"], justify="right")
    table.add_row("training tokens", *(short(arm["tokens"]) for arm in arms))
    table.add_row("of them synthetic", *(short(arm["synthetic_tokens"]) for arm in arms))
    table.add_row("FLOPs in all", *(f"{arm['total_flops']:.2e}" for arm in arms))
    for name, metric in results["metrics"].items():
        unit = ", %" if metric["percent"] else ""
        table.add_row(f"{metric['label']}{unit}", *(_measure(arm[name], metric) for arm in arms))
        table.add_row("change to baseline", *(_change(arm["difference_to_baseline"].get(name), metric) for arm in arms))
    return table


def _measure(interval: Mapping[str, Any], metric: Mapping[str, Any], signed: bool = False) -> str:
    value, low, high = (wording.number(interval[key], metric, signed) for key in ("value", "low", "high"))
    return f"{value}\n[{low}, {high}]"


def _change(difference: Mapping[str, Any] | None, metric: Mapping[str, Any]) -> Text:
    if difference is None:
        return Text("")
    return Text(_measure(difference, metric, signed=True), STYLES[wording.outcome(difference, metric)])
