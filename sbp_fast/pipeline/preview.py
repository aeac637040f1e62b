"""What running a stage would do, found out without writing anything."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sbp_fast.config.files import diff_config
from sbp_fast.errors import UserError
from sbp_fast.pipeline.manifest import CLOCK, MANIFEST, PLAN, Manifest, damaged_files
from sbp_fast.pipeline.output import partial_path
from sbp_fast.pipeline.progress import duration
from sbp_fast.pipeline.seals import read_sealed_json

Action = Literal["skip", "resume", "run", "replace", "refuse"]
_previewing: ContextVar[bool] = ContextVar("previewing", default=False)


@dataclass(frozen=True)
class PlannedAction:
    """What running a stage would do.

    Attributes:
        action: "skip" a finished output, "resume" an unfinished one, "run" from the beginning, "replace" what was made from
            other settings or inputs, or "refuse" that without `force`.
        reason: why, or what is there already; may be "".
        manifest: of the finished output that is skipped.
    """

    action: Action
    reason: str = ""
    manifest: Manifest | None = None


class _Previewed(BaseException):
    """Ends the function of a stage where `run_stage` would begin; no handler of exceptions is for it."""

    def __init__(self, planned: PlannedAction) -> None:
        self.planned = planned


def preview(run: Callable[[], Any]) -> PlannedAction | None:
    """Return what a call of a stage's function would do; the function is called, and ends where it would begin to write.

    Args:
        run: calls the function of a stage, in this process.

    Returns:
        The planned action; None in every process but rank 0.

    Raises:
        UserError: the function refuses its arguments.
    """
    token = _previewing.set(True)
    try:
        run()
    except _Previewed as seen:
        return seen.planned
    finally:
        _previewing.reset(token)
    return None


def is_previewing() -> bool:
    """Return whether `preview` called the stage that is about to run."""
    return _previewing.get()


def end_preview(out: Path, plan: dict[str, Any], *, force: bool) -> None:
    """End the function that `preview` called, with the planned action of its stage; for the arguments see `planned_action`."""
    raise _Previewed(planned_action(out, plan, force=force))


def planned_action(out: Path, plan: dict[str, Any], *, force: bool) -> PlannedAction:
    """Return what running a stage would do; of files that are there already it compares the sizes, not the checksums.

    Args:
        out: directory of the output.
        plan: the stage, its settings and the fingerprints of its inputs.
        force: whether a finished or unfinished output that was made otherwise is replaced.
    """
    otherwise: Action = "replace" if force else "refuse"
    partial = partial_path(out)
    if (out / MANIFEST).is_file():
        manifest = Manifest.read(out)
        changes = plan_changes(vars(manifest), plan)
        changes += [f"{file} is missing or damaged" for file in damaged_files(out, manifest.files, hashed=False)]
        return PlannedAction(otherwise, "; ".join(changes)) if changes else PlannedAction("skip", "done before", manifest)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return PlannedAction("refuse", f"{out} already exists and is no stage's output")
    if not (partial / PLAN).is_file():
        return PlannedAction("run")
    try:
        changes = plan_changes(read_sealed_json(partial / PLAN, ""), plan)
        seconds = read_sealed_json(partial / CLOCK, "")["seconds"] if (partial / CLOCK).is_file() else 0.0
    except UserError as error:
        return PlannedAction(otherwise, f"{error.where} is damaged")
    if changes:
        return PlannedAction(otherwise, "; ".join(changes))
    return PlannedAction("resume", f"after {duration(seconds)} of work")


def plan_changes(earlier: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """Return how a stage's settings and inputs differ from those that an output was made from."""
    if earlier.get("stage") != plan["stage"]:
        return [f"stage: {earlier.get('stage')} -> {plan['stage']}"]
    changes = diff_config(earlier["config"], plan["config"])
    old, new = earlier["inputs"], plan["inputs"]
    return changes + [f"input {name} changed" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
