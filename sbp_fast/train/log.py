"""Where the metrics of a run go: metrics.jsonl, trackers, and the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sbp_fast.config import RunConfig
from sbp_fast.pipeline.credentials import strip_credentials
from sbp_fast.pipeline.files import dump_json, parse_json
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.seals import fingerprint_file
from sbp_fast.train.trackers import Tracker, open_trackers

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class Log:
    """Writes each line of metrics to metrics.jsonl, to the trackers of `config.log` and to the terminal.

    Generated texts go to samples.jsonl.

    Args:
        directory: the directory that metrics.jsonl and samples.jsonl are written to.
        out: final path of the run's output; its name is the name of the run, and `out` + ".tracking" is for trackers.
        sizes: name of a file -> bytes that earlier attempts wrote of the steps that are done and saved; 0 of others.
        steps: number of those steps.
        tokens: number of tokens of those steps.
        total_tokens: number of tokens of the whole run.
        writes: whether this process writes; true on rank 0 alone.
    """

    def __init__(
        self,
        directory: Path,
        out: Path,
        config: RunConfig,
        console: Console,
        *,
        sizes: Mapping[str, int],
        steps: int,
        tokens: int,
        total_tokens: int,
        writes: bool,
    ) -> None:
        self.out, self.config, self.console = out, config, console
        self.steps, self.tokens, self.total_tokens = steps, tokens, total_tokens
        self.metrics = LinesFile(directory / METRICS, sizes.get(METRICS, 0)) if writes else None
        self.samples = LinesFile(directory / SAMPLES, sizes.get(SAMPLES, 0)) if writes else None
        self._stack = ExitStack()

    def __enter__(self) -> Log:
        self._task = self._stack.enter_context(self.console.task("train", self.total_tokens, "tokens", done=self.tokens))
        self._trackers: list[Tracker] = []
        if self.metrics is not None and self.samples is not None:
            self._stack.callback(self.metrics.close)
            self._stack.callback(self.samples.close)
            settings, directory = self.config.model_dump(mode="json"), self.out.with_name(self.out.name + ".tracking")
            self._trackers = open_trackers(
                self.config.log.trackers, directory, self.out.name, strip_credentials(settings), self.steps
            )
        for tracker in self._trackers:
            self._stack.callback(tracker.close)
        return self

    def write(self, line: dict[str, Any]) -> None:
        """Write one line of the metrics of steps; trackers get its values that are not null."""
        loss = line["train/loss"]
        self._task.advance(
            line["train/tokens"] - self.tokens, "not finite: step skipped" if loss is None else f"loss {loss:.2f}"
        )
        self.tokens = line["train/tokens"]
        self._send(line)

    def write_validation(self, line: dict[str, Any]) -> None:
        """Write one line of the figures of a validation point; trackers get its values that are not null."""
        loss = line["validation/loss"]
        shown = "not finite" if loss is None else f"{loss:.3f} nats a token"
        self.console.say(f"held-out loss after {line['step'] + 1} steps: {shown}")
        self._send(line)

    def write_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Write a line for each text that was generated after `step`."""
        if self.samples is not None:
            for sample in samples:
                self.samples.write({"step": step, **sample})

    def _send(self, line: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(line)
        for tracker in self._trackers:
            tracker.log({key: value for key, value in line.items() if value is not None and key != "step"}, line["step"])

    def sync(self) -> dict[str, dict[str, Any]]:
        """Make the lines written so far durable, for a checkpoint that counts on them; return the checksum of each file."""
        files = [file for file in (self.metrics, self.samples) if file is not None]
        for file in files:
            file.sync()
        return {file.path.name: fingerprint_file(file.path) for file in files}

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class LinesFile:
    """A file of JSON lines, opened for appending after those that stay of earlier attempts.

    Args:
        path: of the file.
        size: bytes at its beginning that stay.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        # open as long as the run; whole lines, because `sbp-fast watch` reads them meanwhile
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._file.truncate(size)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        self._file.write(dump_json(line, self.path) + "\n")

    def sync(self) -> None:
        """Make the lines written so far durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make all lines durable and close the file."""
        self.sync()
        self._file.close()


def read_curve(path: Path, figure: str) -> list[tuple[int, float]]:
    """Return (training tokens, value) of each line of a metrics.jsonl in which a figure has a value.

    Args:
        path: of the file.
        figure: a key of the lines, such as "train/loss" or "validation/loss".
    """
    return [(line["train/tokens"], line[figure]) for line in read_lines(path, figure)]


def read_lines(path: Path, figure: str) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl in which a figure has a value."""
    lines = [parse_json(line) for line in path.read_bytes().splitlines()]
    return [line for line in lines if line.get(figure) is not None]
