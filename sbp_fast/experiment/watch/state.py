"""The state of a run, read from its files while another process writes them; nothing is written or locked."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError
from sbp_fast.experiment.graph import Stage, stages_of
from sbp_fast.experiment.report.page import HELDOUT_LOSS, LOSS, REPORT
from sbp_fast.experiment.run import CONFIG
from sbp_fast.experiment.time_estimate import TimeEstimate, describe_sum, read_finished
from sbp_fast.pipeline.files import parse_json
from sbp_fast.pipeline.manifest import CLOCK, PLAN
from sbp_fast.pipeline.output import is_locked, partial_path
from sbp_fast.pipeline.seals import read_sealed_json
from sbp_fast.train.log import METRICS, SAMPLES

Status = Literal["done", "running", "stopped", "waiting"]
TRAINING = ("train/", "tune/")
ATTEMPTS = 3  # to read a run whose directories are renamed meanwhile


@dataclass(frozen=True)
class StageState:
    """State of a stage.

    Attributes:
        stage: the stage.
        directory: of its output, or of its unfinished output.
        status: "done", "running", "stopped" (begun, and no process on this machine writes it) or "waiting".
        seconds: of work so far; 0 of a stage that waits.
        share: of the tokens that a begun training has read; None of other stages.
        left: expected seconds until its end; None where no speed is known.
    """

    stage: Stage
    directory: Path
    status: Status
    seconds: float
    share: float | None
    left: float | None


@dataclass
class Losses:
    """Losses that a training has logged so far, as (training tokens, nats a token); each line of its file is read once."""

    training: list[tuple[float, float]] = field(default_factory=list)
    heldout: list[tuple[float, float]] = field(default_factory=list)
    _read: tuple[int, int] = (0, 0)  # inode of the file, and its bytes that have been read

    def read(self, path: Path) -> None:
        """Read the lines that are new, without a last one that is being written.

        Raises:
            UserError: a line is no line of metrics.
        """
        with open(path, "rb") as file:
            (inode, size), status = self._read, os.fstat(file.fileno())
            if status.st_ino != inode or status.st_size < size:  # another file, or one that a new attempt has cut
                size = 0
                self.training.clear()
                self.heldout.clear()
            file.seek(size)
            lines, newline, _ = file.read().rpartition(b"\n")
            self._read = status.st_ino, size + len(lines) + len(newline)
        for line in lines.splitlines():
            try:
                values = parse_json(line)
                for figure, points in ((LOSS, self.training), (HELDOUT_LOSS, self.heldout)):
                    if values.get(figure) is not None:
                        points.append((float(values["train/tokens"]), float(values[figure])))
            except (ValueError, TypeError, KeyError, AttributeError):
                self._read = (0, 0)
                raise UserError(path, "holds a line that is none of metrics", "rerun its stage") from None


@dataclass(frozen=True)
class RunState:
    """State of a run.

    Attributes:
        config: of the run.
        stages: of all its stages, in the order of the run.
        losses: stage -> losses, of each training that has begun.
        samples: texts that the training which wrote last has generated at its last point.
        samples_stage: name of that training; "" if none has.
        has_report: whether its report is written.
    """

    config: RunConfig
    stages: list[StageState]
    losses: dict[str, Losses]
    samples: list[dict[str, Any]]
    samples_stage: str
    has_report: bool

    def count(self, status: Status) -> int:
        """Return the number of stages with a status."""
        return sum(state.status == status for state in self.stages)

    def describe_left(self) -> str:
        """Return the expected time of all that is left; stages are taken to run as many at a time as they do now."""
        left = [state.left for state in self.stages if state.status != "done"]
        return describe_sum(left, max(1, self.count("running")))


class RunReader:
    """Reads the state of a run again and again.

    Args:
        run: directory of the run.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._losses: dict[str, Losses] = {}

    def read(self) -> RunState:
        """Return the state of the run now.

        Raises:
            UserError: the directory is no run, or a file in it is damaged.
        """
        if not (self.run / CONFIG).is_file():
            raise UserError(self.run, f"is no run: it has no {CONFIG}", "give the directory of `sbp-fast run --out`")
        for _ in range(ATTEMPTS - 1):
            try:
                return self._read()
            except FileNotFoundError:  # a stage has just been finished, and its directory renamed
                continue
        return self._read()

    def _read(self) -> RunState:
        config = load_config([self.run / CONFIG])
        stages = stages_of(config)
        finished = {name: read_finished(self.run / name) for name in stages}
        estimate = TimeEstimate(config, [manifest for manifest in finished.values() if manifest is not None], gpus=1)
        states, losses = [], dict[str, Losses]()
        for name, stage in stages.items():
            manifest, out = finished[name], self.run / name
            directory = out if manifest is not None else partial_path(out)
            if name.startswith(TRAINING) and (directory / METRICS).is_file():
                losses[name] = self._losses.setdefault(name, Losses())
                losses[name].read(directory / METRICS)
            if manifest is not None:
                states.append(StageState(stage, directory, "done", manifest.seconds, None, None))
            else:
                states.append(_unfinished(stage, directory, is_locked(out), estimate, losses.get(name)))
        samples_stage, samples = _newest_samples(states)
        return RunState(config, states, losses, samples, samples_stage, (self.run / REPORT).is_file())


def _unfinished(stage: Stage, directory: Path, locked: bool, estimate: TimeEstimate, losses: Losses | None) -> StageState:
    expected = estimate.of_stage(stage)
    if not (directory / PLAN).is_file():
        return StageState(stage, directory, "waiting", 0.0, None, expected)
    seconds, share = _elapsed(directory, locked), None
    left = None if expected is None else max(expected - seconds, 0.0)
    if losses is not None and losses.training:
        share = min(losses.training[-1][0] / estimate.cost(stage).tokens, 1.0)
        left = seconds * (1 - share) / share if share else left
    return StageState(stage, directory, "running" if locked else "stopped", seconds, share, left)


def _elapsed(directory: Path, running: bool) -> float:
    """Return the seconds of work on an unfinished output: those saved last, and those since then if it is being written."""
    clock = directory / CLOCK
    is_saved = clock.is_file()
    since = (clock if is_saved else directory / PLAN).stat().st_mtime
    saved = float(read_sealed_json(clock, "rerun: it resumes")["seconds"]) if is_saved else 0.0
    return saved + (max(time.time() - since, 0.0) if running else 0.0)


def _newest_samples(states: Sequence[StageState]) -> tuple[str, list[dict[str, Any]]]:
    """Return the training whose file of samples was written last, and the samples of its last point; of a tie the later one."""
    files = {state.stage.name: state.directory / SAMPLES for state in states if state.stage.name.startswith(TRAINING)}
    written = {name: file.stat() for name, file in files.items() if file.is_file()}
    newest = max((status.st_mtime for status in written.values() if status.st_size), default=None)
    names = [name for name, status in written.items() if status.st_size and status.st_mtime == newest]
    if not names:
        return "", []
    path = files[names[-1]]
    try:
        samples = [parse_json(line) for line in path.read_bytes().rpartition(b"\n")[0].splitlines()]
        samples = [{key: sample[key] for key in ("step", "seed", "text", "stop")} for sample in samples]
    except (ValueError, TypeError, KeyError):
        raise UserError(path, "holds a line that is no sample", "rerun its stage") from None
    return names[-1], [sample for sample in samples if sample["step"] == samples[-1]["step"]]
