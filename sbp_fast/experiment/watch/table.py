"""The state of a run in the terminal, printed once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from sbp_fast.experiment.watch.state import RunReader, StageState
from sbp_fast.pipeline.progress import duration


def describe_run(run: Path) -> Iterator[Table | str]:
    """Yield a table of the stages of a run, and a line with their sums.

    Raises:
        UserError: the directory is no run, or a file in it is damaged.
    """
    state = RunReader(run).read()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("stage", "status", "time", "left"):
        table.add_column(column, justify="right" if column in ("time", "left") else "left", overflow="fold")
    for each in state.stages:
        status = each.status if each.share is None else f"{each.status} {each.share:.0%}"
        time = "" if each.status == "waiting" else duration(each.seconds)
        table.add_row(escape(each.stage.name), status, time, _left(each))
    yield table
    done = state.count("done")
    left = "" if done == len(state.stages) else f"; left: {state.describe_left()}"
    yield f"{done} of {len(state.stages)} stages done{left}"


def _left(state: StageState) -> str:
    if state.status == "done":
        return ""
    return "not known yet" if state.left is None else duration(state.left)
