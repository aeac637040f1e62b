"""Where the metrics of a run go: metrics.jsonl, trackers, and the terminal."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sbp_fast.config import RunConfig
from sbp_fast.pipeline.distributed import Processes
from sbp_fast.pipeline.files import atomic_open
from sbp_fast.pipeline.stage import Work
from sbp_fast.train.data.batches import Batches
from sbp_fast.train.metrics import Totals
from sbp_fast.train.trackers import Tracker, open_trackers

METRICS = "metrics.jsonl"


class Log:
    """Where the lines of a run go: metrics.jsonl, trackers, and the terminal; process 0 alone writes."""

    def __init__(self, work: Work, config: RunConfig, processes: Processes, totals: Totals, batches: Batches) -> None:
        self.work, self.config, self.is_rank0, self.tokens = work, config, processes.is_rank0, totals.tokens
        self.total = batches.steps * batches.streams_per_step * batches.stream_tokens
        self.metrics = MetricsFile(work.directory, totals.steps) if self.is_rank0 else None
        self._stack = ExitStack()

    def __enter__(self) -> Log:
        self._task = self._stack.enter_context(self.work.console.task("train", self.total, "tokens", done=self.tokens))
        self._trackers: list[Tracker] = []
        if self.metrics is not None:
            self._stack.callback(self.metrics.close)
            settings, name = self.config.model_dump(mode="json"), self.work.out.name
            self._trackers = open_trackers(self.config.log.trackers, self.work.beside(".tracking"), name, settings)
        for tracker in self._trackers:
            self._stack.callback(tracker.close)
        return self

    def write(self, line: dict[str, Any]) -> None:
        loss = line["train/loss"]
        self._task.advance(
            line["train/tokens"] - self.tokens, "not finite: step skipped" if loss is None else f"loss {loss:.2f}"
        )
        self.tokens = line["train/tokens"]
        if self.metrics is not None:
            self.metrics.write(line)
        for tracker in self._trackers:
            tracker.log({key: value for key, value in line.items() if value is not None and key != "step"}, line["step"])

    def sync(self) -> None:
        """Before a checkpoint, so that no line it counts on is missing."""
        if self.metrics is not None:
            self.metrics.sync()

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class MetricsFile:
    """metrics.jsonl of one run, written by process 0; opened on what an earlier attempt wrote of the first `steps` steps."""

    def __init__(self, directory: Path, steps: int) -> None:
        self.path = directory / METRICS
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < steps]
        with atomic_open(self.path) as file:
            file.writelines(line.encode() + b"\n" for line in kept)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Before a checkpoint, so that no line it counts on is missing."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (directory / METRICS).read_text(encoding="utf-8").splitlines()]
