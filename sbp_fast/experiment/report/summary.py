"""The table that a finished run prints in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from sbp_fast.experiment.report import wording
from sbp_fast.pipeline.progress import short

STYLES = {"better": "green", "worse": "red", "unclear": "", "unreplicated": ""}


def summary_table(results: Mapping[str, Any]) -> Table:
    """Return a row for each arm: its tokens and FLOPs, and each main metric with its interval and its change."""
    table = Table(title=wording.verdict(results), title_justify="left", title_style="bold", show_lines=True)
    metrics = wording.main_metrics(results["metrics"])
    table.add_column("arm")
    table.add_column("training tokens,\nsynthetic,\nFLOPs in all", justify="right")
    for metric in metrics.values():
        table.add_column(f"{metric['label']}{', %' if metric['percent'] else ''}", justify="right")
    for arm in results["arms"].values():
        scores = [_score(arm, name, metric) for name, metric in metrics.items()]
        cost = f"{short(arm['tokens'])}\n{short(arm['synthetic_tokens'])}\n{arm['total_flops']:.2e}"
        table.add_row(arm["label"], cost, *scores)
    return table


def _score(arm: Mapping[str, Any], name: str, metric: Mapping[str, Any]) -> Text:
    """Return an arm's value with its interval and the remark that it is at chance, and below them its change."""
    score, difference = arm[name], arm["difference_to_baseline"].get(name)
    text = Text(f"{wording.number(score['value'], metric)}{_brackets(score, metric)}")
    if wording.at_chance(score, metric):
        text.append("\nat chance")
    if difference is not None:
        change = f"\n{wording.number(difference['value'], metric, signed=True)}{_brackets(difference, metric, signed=True)}"
        text.append(change, STYLES[wording.outcome(difference, metric)])
    return text


def _brackets(interval: Mapping[str, Any], metric: Mapping[str, Any], signed: bool = False) -> str:
    if not wording.has_interval(interval):
        return ""
    return "\n[{}, {}]".format(*(wording.number(interval[key], metric, signed) for key in ("low", "high")))
