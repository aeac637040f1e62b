"""What a run says about its progress: a banner, and a line for each stage that ends, with the time that is left."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from sbp_fast.config import RunConfig, resolve_device, resolve_threads
from sbp_fast.experiment.graph import Stage
from sbp_fast.experiment.side_by_side import stage_title
from sbp_fast.experiment.time_estimate import TimeEstimate, describe_sum, read_finished
from sbp_fast.pipeline.progress import Console, duration


class RunProgress:
    """The progress of a run: which of its stages are finished, and when the others are expected to be.

    Args:
        config: of the run.
        out: the run's directory.
        stages: all stages of the run.
        chosen: names of the stages that are run.
        console: where it is printed.
        gpus: processes that train and synthesize.
        side_by_side: number of stages that run at a time.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        stages: Mapping[str, Stage],
        chosen: Collection[str],
        console: Console,
        *,
        gpus: int = 1,
        side_by_side: int = 1,
    ) -> None:
        self.config, self.out, self.stages, self.console = config, out, stages, console
        self.gpus, self.side_by_side = gpus, side_by_side
        self.left = [name for name in stages if name in chosen]
        manifests = {name: read_finished(out / name) for name in self.left}
        self.finished = {name: manifest for name, manifest in manifests.items() if manifest is not None}

    def print_banner(self) -> None:
        """Print the size of the run, its directory, what it runs on, and the expected time."""
        done = f", {len(self.finished)} of them done before" if self.finished else ""
        self.console.say(f"run {self.config.name}: {len(self.left)} stages{done}; into {self.out}")
        processes = f"{self.gpus} processes, " if self.gpus > 1 else ""
        threads = resolve_threads(self.config)
        device = f"{resolve_device(self.config)}, {processes}{threads} {'thread' if threads == 1 else 'threads'}"
        self.console.say(f"device: {device}; expected: {self._expect(set(self.left) - self.finished.keys())}")

    def ended(self, name: str) -> None:
        """Print that a stage has ended, with its time and the time that the others are expected to take.

        A stage that was finished before has said so.
        """
        self.left.remove(name)
        before, manifest = self.finished.get(name), read_finished(self.out / name)
        if manifest is None or manifest == before:
            return
        self.finished[name] = manifest
        left = [name for name in self.left if name not in self.finished]
        remaining = f"; left: {self._expect(left)}" if left else ""
        self.console.say(f"[{stage_title(self.stages, name)}] finished in {duration(manifest.seconds)}{remaining}")

    def _expect(self, names: Collection[str]) -> str:
        estimate = TimeEstimate(self.config, self.finished.values(), self.gpus)
        return describe_sum((estimate.of_stage(self.stages[name]) for name in names), self.side_by_side)
