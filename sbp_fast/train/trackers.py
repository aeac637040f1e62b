"""Where a run's metrics go besides metrics.jsonl, under the same keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from sbp_fast.errors import UserError


class Tracker(Protocol):
    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `directory`/tensorboard."""

    def __init__(self, directory: Path, name: str, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project sbp-fast; what WANDB_MODE and its like say holds. `trackio` has the same interface."""

    package = "wandb"

    def __init__(self, directory: Path, name: str, config: dict[str, Any]) -> None:
        module = __import__(self.package)
        self.run = module.init(project="sbp-fast", name=name, config=config)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio(WeightsAndBiases):
    """A run of the project sbp-fast in trackio's database on this machine."""

    package = "trackio"


TRACKERS: dict[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def open_trackers(names: Sequence[str], directory: Path, name: str, config: dict[str, Any]) -> list[Tracker]:
    """A tracker for each of `names`.

    Raises:
        UserError: one whose package is not installed.
    """
    opened = []
    for tracker in names:
        try:
            opened.append(TRACKERS[tracker](directory, name, config))
        except ImportError as error:
            remedy = f"pip install {tracker}, or leave it out of log.trackers"
            raise UserError(f"log.trackers: {tracker}", f"cannot be used: {error}", remedy) from None
    return opened
