"""Experiment trackers, which receive the metrics of metrics.jsonl under the same keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from sbp_fast.errors import UserError
from sbp_fast.registry import Registry


class Tracker(Protocol):
    """An open run of a tracker."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step."""

    def close(self) -> None:
        """Write out what is pending and end the run."""


TRACKERS: Registry[Callable[[Path, str, dict[str, Any]], Tracker]] = Registry("tracker")
"""What `log.trackers` may name: each entry opens a run in a directory, with a run name and the configuration.

An entry imports its package when it is called, so that a package that is not installed is an ImportError there.
"""


class TensorBoard:
    """Event files in `directory`/tensorboard."""

    def __init__(self, directory: Path, name: str, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step."""
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Write out what is pending."""
        self.writer.close()


class WeightsAndBiases:
    """A run of the project sbp-fast in Weights & Biases; its environment variables (WANDB_MODE and others) apply."""

    package = "wandb"

    def __init__(self, directory: Path, name: str, config: dict[str, Any]) -> None:
        module = __import__(self.package)
        self.run = module.init(project="sbp-fast", name=name, config=config)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step."""
        self.run.log(metrics, step=step)

    def close(self) -> None:
        """End the run."""
        self.run.finish()


class Trackio(WeightsAndBiases):
    """A run of the project sbp-fast in trackio's local database; trackio has the interface of wandb."""

    package = "trackio"


TRACKERS.register("tensorboard", TensorBoard)
TRACKERS.register("wandb", WeightsAndBiases)
TRACKERS.register("trackio", Trackio)


def open_trackers(names: Sequence[str], directory: Path, name: str, config: dict[str, Any]) -> list[Tracker]:
    """Open a run in each of the named trackers.

    Raises:
        UserError: the package of a tracker is not installed.
    """
    opened = []
    for tracker in names:
        try:
            opened.append(TRACKERS[tracker](directory, name, config))
        except ImportError as error:
            remedy = f"pip install {tracker}, or leave it out of log.trackers"
            raise UserError(f"log.trackers: {tracker}", f"cannot be used: {error}", remedy) from None
    return opened
