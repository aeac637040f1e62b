"""The contract of a stage: it reads directories and writes one directory with a manifest; it is done, resumable or stale.

While a stage runs, its output lies in `NAME.partial`, which holds only whole files (see `files.py`) and the plan that it was
started with. What a later attempt accepts has a checksum (see `seals.py`). When the work is done, the counts are saved, scratch
space is removed, the manifest is written and the directory is renamed. A killed stage resumes in its partial directory. A
directory made from other inputs or settings is refused with a list of what changed. With several processes, rank 0 owns the
directory and the others are called with its path.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbp_fast.errors import TransientError, UserError
from sbp_fast.pipeline.credentials import strip_credentials
from sbp_fast.pipeline.files import TEMPORARY_SUFFIX, hash_value, sync_directory
from sbp_fast.pipeline.finite import require_finite
from sbp_fast.pipeline.manifest import (
    CLOCK,
    COMPLETE,
    LOGS,
    MANIFEST,
    PLAN,
    SCRATCH,
    Manifest,
    damaged_files,
    output_files,
    refuse_unlisted_files,
)
from sbp_fast.pipeline.output import disk_errors_are_user_errors, locked, partial_path, resolve_output
from sbp_fast.pipeline.preview import end_preview, is_previewing, plan_changes
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.seals import SEAL_SUFFIX, fingerprint_file, read_sealed_json, write_sealed_json

if TYPE_CHECKING:
    from sbp_fast.pipeline.distributed import Processes

START_AGAIN = "rerun with --force to start again"


@dataclass
class StageContext:
    """Directories and console for the body of a stage, and the manifest entries that it fills in.

    Attributes:
        directory: where the output is written; renamed to `out` when the stage is finished.
        out: the final path of the directory.
        inputs: input name -> directory of a finished stage.
        console: for progress.
        flops: floating-point operations of models, for the compute ledger.
        device: the device that did the work, for the manifest.
        counts: counts and measurements, for the manifest.
        files: relative path -> {"bytes", "xxh3"} of each file of the output, once the body has finished.
    """

    directory: Path
    out: Path
    inputs: dict[str, Path]
    console: Console
    flops: float = 0.0
    device: str = "cpu"
    counts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)
    _earlier_seconds: float = 0.0

    def record(self, **counts: Any) -> None:
        """Add to the manifest's counts.

        Raises:
            UserError: a number among them is not finite.
        """
        require_finite(counts, self.out)
        self.counts.update(strip_credentials(counts))

    @property
    def scratch(self) -> Path:
        """Directory for files that are not part of the output; `run_stage` removes it when the body has returned."""
        path = self.directory / SCRATCH
        path.mkdir(exist_ok=True)
        return path

    def mark_complete(self) -> None:
        """Save the counts and the checksums of the output; a later attempt then skips the body and only cleans up."""
        paths = sorted(output_files(self.directory))
        self.files = {str(path.relative_to(self.directory)): fingerprint_file(path) for path in paths}
        saved = {"counts": self.counts, "flops": self.flops, "device": self.device, "files": self.files}
        write_sealed_json(self.directory / COMPLETE, saved)

    def restore_complete(self) -> bool:
        """Return whether an earlier attempt finished the body; its counts are then restored."""
        path = self.directory / COMPLETE
        if not path.is_file():
            return False
        saved = read_sealed_json(path, START_AGAIN)
        self.counts, self.flops, self.device, self.files = (saved[key] for key in ("counts", "flops", "device", "files"))
        return True

    @property
    def seconds(self) -> float:
        """Seconds of work so far, earlier attempts included up to their last `save_clock`."""
        return self._earlier_seconds + time.monotonic() - self._started

    def beside(self, suffix: str) -> Path:
        """Return a path beside the output, for files that belong to it but are not part of it."""
        return self.out.with_name(self.out.name + suffix)

    def save_clock(self) -> None:
        """Save the seconds so far; called after each durable step, so that a killed attempt's time counts."""
        write_sealed_json(self.directory / CLOCK, {"seconds": self.seconds})


def run_stage(
    stage: str,
    out: Path,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, Path | str],
    body: Callable[[StageContext], None],
    console: Console,
    force: bool = False,
) -> Manifest:
    """Run the body of a stage unless its output is finished, and write the manifest.

    Args:
        stage: name written to the manifest.
        out: directory of the output; complete when this returns.
        config: all settings that the output depends on; JSON-representable.
        inputs: name -> directory of a finished stage, or the fingerprint of another input.
        body: writes into `context.directory`, resuming from the files there.
        console: for progress.
        force: replace a finished or unfinished output that was made from other settings or inputs, or is damaged.

    Raises:
        UserError: an input is not finished, the output was made from other settings or inputs or is damaged (unless `force`),
            its path is unusable, another process is writing it, or the disk is full.
    """
    read = Manifest.read if is_previewing() else Manifest.load
    fingerprints = {name: value if isinstance(value, str) else read(value).fingerprint for name, value in inputs.items()}
    plan = {"stage": stage, "config": strip_credentials(dict(config)), "inputs": fingerprints}
    with disk_errors_are_user_errors(out):
        out = resolve_output(out)
        if is_previewing():
            end_preview(out, plan, force=force)
        partial = partial_path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out):
            if out.exists():
                manifest = _finished(out, plan, force)
                if manifest is not None:
                    console.say("done before")
                    return manifest
            _open_partial(partial, plan, force)
            context = StageContext(partial, out, _directories(inputs), console, _earlier_seconds=_read_clock(partial, console))
            if not context.restore_complete():
                try:
                    body(context)
                except TransientError:
                    raise
                except UserError:  # the next attempt has a corrected input or setting, and starts from scratch
                    shutil.rmtree(partial / SCRATCH, ignore_errors=True)
                    _clear_untouched(partial)
                    raise
                context.mark_complete()
            shutil.rmtree(partial / SCRATCH, ignore_errors=True)
            return _finish(context, plan, out)


def run_stage_together(
    processes: Processes, stage: str, out: Path, *, body: Callable[[StageContext], None], **options: Any
) -> Manifest | None:
    """Run a stage whose body several processes run together; rank 0 owns the directory.

    Args:
        processes: this process and its process groups.
        stage: see `run_stage`.
        out: see `run_stage`.
        body: see `run_stage`; called in every process.
        **options: other arguments of `run_stage`.

    Returns:
        The manifest; None in every process but rank 0.
    """
    from sbp_fast.pipeline.distributed import run_on_rank0  # here, because most stages do not need torch

    def rank0(announce: Callable[[Path], None]) -> Manifest:
        def announced_body(context: StageContext) -> None:
            announce(context.directory)
            body(context)

        return run_stage(stage, out, body=announced_body, **options)

    def others(directory: Path) -> None:
        body(StageContext(directory, out, _directories(options["inputs"]), Console(quiet=True)))

    return run_on_rank0(processes, rank0, others)


def _directories(inputs: Mapping[str, Path | str]) -> dict[str, Path]:
    return {name: value for name, value in inputs.items() if isinstance(value, Path)}


def _finished(out: Path, plan: dict[str, Any], force: bool) -> Manifest | None:
    """Return the manifest of `out` if it is the output of this plan; None if it was empty, or removed by `force`."""
    if not (out / MANIFEST).is_file():
        if not out.is_dir() or any(out.iterdir()):
            raise UserError(out, "already exists and is no stage's output", "choose another output directory")
        out.rmdir()
        return None
    manifest = Manifest.read(out)
    changes = plan_changes(vars(manifest), plan)
    if not changes and not (force and any(damaged_files(out, manifest.files))):
        return Manifest.load(out)
    if not force:
        raise UserError(
            out,
            f"was made from other settings or inputs: {'; '.join(changes)}",
            "rerun with --force to replace it, or choose another --out",
        )
    shutil.rmtree(out)
    return None


def _open_partial(partial: Path, plan: dict[str, Any], force: bool) -> None:
    """Make the directory of a new attempt, or accept that of an earlier one."""
    if partial.exists():
        try:
            _check_partial(partial, plan)
        except UserError:
            if not force:
                raise
            shutil.rmtree(partial)
    if not partial.exists():
        partial.mkdir()
        write_sealed_json(partial / PLAN, plan)
    _clear(partial, TEMPORARY_SUFFIX)


def _check_partial(partial: Path, plan: dict[str, Any]) -> None:
    """Refuse an earlier attempt that was begun otherwise, or whose plan or finished output is damaged."""
    if not (partial / PLAN).is_file() and all(path.name.endswith(TEMPORARY_SUFFIX) for path in partial.iterdir()):
        write_sealed_json(partial / PLAN, plan)  # killed before its plan was written
    changes = plan_changes(read_sealed_json(partial / PLAN, START_AGAIN), plan)
    if changes:
        raise UserError(
            partial,
            f"was begun with other settings or inputs: {'; '.join(changes)}",
            "rerun with --force to start again, or choose another --out",
        )
    if (partial / COMPLETE).is_file():
        for file in damaged_files(partial, read_sealed_json(partial / COMPLETE, START_AGAIN)["files"]):
            raise UserError(file, "missing or damaged since it was written", START_AGAIN)


def _read_clock(partial: Path, console: Console) -> float:
    """Return the seconds of earlier attempts."""
    if not (partial / CLOCK).is_file():
        return 0.0
    try:
        return float(read_sealed_json(partial / CLOCK, START_AGAIN)["seconds"])
    except UserError as error:
        console.say(f"{error.where}: {error.what}, so the seconds of earlier attempts are not counted")
        return 0.0


def _clear(partial: Path, suffix: str) -> None:
    """Remove the files whose names end so."""
    for leftover in partial.rglob(f"*{suffix}"):
        leftover.unlink(missing_ok=True)


def _clear_untouched(partial: Path) -> None:
    # an input was refused before anything was written: without this plan, the corrected input is not refused as a change
    if {path.name for path in partial.iterdir()} <= {PLAN, CLOCK}:
        shutil.rmtree(partial)


def _finish(context: StageContext, plan: dict[str, Any], out: Path) -> Manifest:
    for suffix in (TEMPORARY_SUFFIX, SEAL_SUFFIX):  # temporary files are left by a killed worker, whose task another one ran
        _clear(context.directory, suffix)
    refuse_unlisted_files(context.directory, context.files)
    content = {name: entry for name, entry in context.files.items() if Path(name).name not in LOGS}
    manifest = Manifest(
        **plan,
        files=context.files,
        counts=context.counts,
        flops=context.flops,
        seconds=round(context.seconds, 3),
        device=context.device if context.device != "cpu" else f"cpu ({platform.machine()})",
        fingerprint=hash_value([plan, content]),
    )
    manifest.write(context.directory)
    os.replace(context.directory, out)  # after a kill before this line, the next attempt only repeats `_finish`
    sync_directory(out.parent)
    for name in (PLAN, CLOCK, COMPLETE):
        (out / name).unlink(missing_ok=True)
    return manifest
