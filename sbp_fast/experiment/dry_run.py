"""What a run would do, before it does it: its stages with their inputs, and the time and disk that the plan expects."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from sbp_fast.config import RunConfig
from sbp_fast.errors import UserError
from sbp_fast.experiment.costs import CorpusEstimate, Cost, pretraining
from sbp_fast.experiment.graph import Stage
from sbp_fast.experiment.run import check_directory, check_run
from sbp_fast.experiment.time_estimate import TimeEstimate, describe_sum
from sbp_fast.pipeline.output import PARTIAL_SUFFIX, disk_errors_are_user_errors
from sbp_fast.pipeline.preview import PlannedAction, preview
from sbp_fast.pipeline.progress import Console, duration, short
from sbp_fast.train.task import TrainTask

UNLESS_EQUAL = "unless its inputs come out the same"
ACTIONS = {"skip": "done before", "resume": "to resume", "run": "to run", "replace": "to replace", "refuse": "refused"}
"""Actions that may be planned, as the last lines count them."""


@dataclass(frozen=True)
class Entry:
    """A stage about to be run or skipped.

    Attributes:
        name: of the stage.
        planned: what would be done.
        inputs: what it reads.
        seconds: expected time, the measured one of a stage that is skipped; None where nothing tells.
        disk: expected bytes, those of the files of a stage that is skipped.
        flops: that it would take.
    """

    name: str
    planned: PlannedAction
    inputs: tuple[str, ...]
    seconds: float | None
    disk: float
    flops: float


def dry_run_entries(config: RunConfig, out: Path, *, gpus: int = 1, force: bool = False, until: str = "") -> list[Entry]:
    """Return what `run` would do with the same arguments; nothing is written.

    Inputs are looked at as `run` does, so that it refuses what `run` would refuse at once. A stage that `run` would refuse is
    the last entry.

    Raises:
        UserError: see `run`.
    """
    stages, chosen = check_run(config, until)
    with disk_errors_are_user_errors(out):
        check_directory(config, out, force)
    actions: dict[str, PlannedAction] = {}
    for name, stage in stages.items():
        if name in chosen:
            actions[name] = _planned(stage, out, actions, force)
            if actions[name].action == "refuse":
                break
    finished = [planned.manifest for planned in actions.values() if planned.manifest]
    estimate, entries = TimeEstimate(config, finished, gpus), []
    for name, planned in actions.items():
        stage = stages[name]
        cost, seconds = estimate.cost(stage), estimate.of_stage(stage)
        entries.append(make_entry(name, planned, stage.inputs.values(), cost, seconds))
    return entries


def _planned(stage: Stage, out: Path, earlier: Mapping[str, PlannedAction], force: bool) -> PlannedAction:
    if any(earlier[source].action != "skip" for source in stage.inputs.values()):
        exists = (out / stage.name).exists() or (out / f"{stage.name}{PARTIAL_SUFFIX}").exists()
        return PlannedAction("run", UNLESS_EQUAL if exists else "")
    return preview_here(lambda: stage.run_in(out, console=Console(quiet=True), force=force))


def preview_here(run: Callable[[], object]) -> PlannedAction:
    """Return what a call of a stage's function would do, in a process that works alone."""
    planned = preview(run)
    if planned is None:
        raise UserError("--dry-run", "is for one process", "leave out torchrun")
    return planned


def make_entry(name: str, planned: PlannedAction, inputs: Iterable[str], cost: Cost, seconds: float | None) -> Entry:
    """Return the entry of a stage: measured figures where it is skipped, the expected seconds and cost otherwise."""
    if (manifest := planned.manifest) is not None:
        size = math.fsum(file["bytes"] for file in manifest.files.values())
        return Entry(name, planned, tuple(inputs), manifest.seconds, size, manifest.flops)
    return Entry(name, planned, tuple(inputs), seconds, cost.disk, cost.flops)


def training_entry(
    config: RunConfig, task: TrainTask, out: Path, inputs: Mapping[str, Path | None], *, gpus: int = 1, force: bool = False
) -> Entry:
    """Return what `train` would do with the same arguments; nothing is written.

    Raises:
        UserError: see `train`.
    """
    from sbp_fast.stages.train import train

    given: dict[str, Any] = {name: path for name, path in inputs.items() if path is not None}
    call = partial(train, config, task, out, console=Console(quiet=True), force=force, **given)
    cost = pretraining(task.recipe)(config, CorpusEstimate.guess(config))
    seconds = TimeEstimate(config, [], gpus).of_cost("train", cost)
    return make_entry(str(out), preview_here(call), map(str, given.values()), cost, seconds)


def describe(entries: list[Entry], out: Path) -> list[Table | str]:
    """Return a table of the stages, and lines with their sums."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("stage", overflow="fold")  # its lines break between words, so that all columns fit into few
    table.add_column("would", no_wrap=True)
    for figure in ("time", "disk"):
        table.add_column(figure, justify="right", no_wrap=True)
    for entry in entries:
        table.add_row(*map(escape, (_stage(entry), entry.planned.action, _time(entry), _bytes(entry.disk))))
    return [table, *_sums(entries, out)]


def _stage(entry: Entry) -> str:
    reads = f"from {', '.join(entry.inputs)}" if entry.inputs else ""
    below = "; ".join(part for part in (entry.planned.reason, reads) if part)
    return f"{entry.name}\n  {below}" if below else entry.name


def _bytes(size: float) -> str:
    return f"{short(size).replace('B', 'G')}B"


def _time(entry: Entry) -> str:
    if entry.seconds is None:
        return f"{entry.flops:.1e} FLOPs"
    return f"{'took ' if entry.planned.action == 'skip' else ''}{duration(entry.seconds)}"


def _sums(entries: list[Entry], out: Path) -> Iterable[str]:
    counts = {action: [entry for entry in entries if entry.planned.action == action] for action in ACTIONS}
    yield ", ".join(f"{len(members)} {ACTIONS[action]}" for action, members in counts.items() if members)
    left = [entry for entry in entries if entry.planned.action != "skip"]
    parent = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(os.path.realpath(parent)).free
    disk = math.fsum(entry.disk for entry in left)
    expected = describe_sum(entry.seconds for entry in left)
    yield f"expected: {expected}; {_bytes(disk)} of disk, {_bytes(free)} are free"
    yield "nothing was written"
