"""Experiment trackers, which receive the metrics of metrics.jsonl under the same keys."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from sbp_fast.errors import UserError
from sbp_fast.pipeline.credentials import without_credentials
from sbp_fast.pipeline.files import read_json, write_json
from sbp_fast.registry import Registry

WANDB_RUN = "wandb-run.json"
"""File with the id of a run of Weights & Biases, in the directory of the trackers."""


class Tracker(Protocol):
    """An open run of a tracker."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step."""

    def close(self) -> None:
        """Write out what is pending and end the run."""


TRACKERS: Registry[Callable[[Path, str, dict[str, Any], int], Tracker]] = Registry("tracker")
"""What `log.trackers` may name: each entry opens a run in a directory, with a run name, the configuration without secrets, and
the number of steps that earlier attempts have taken and saved: the step of the first metrics that come.

An entry imports its package when it is called, so that a package that is not installed is an ImportError there.
"""


class TensorBoard:
    """Event files in `directory`/tensorboard; steps that a resumed run takes again replace those of the earlier attempt."""

    def __init__(self, directory: Path, name: str, config: dict[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step."""
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Write out what is pending."""
        self.writer.close()


class WeightsAndBiases:
    """A run of the project sbp-fast in Weights & Biases; its environment variables (WANDB_MODE and others) apply.

    A training that goes on from a checkpoint goes on with its run, whose id is kept in `directory`, beside the files of wandb
    itself. Of a step that is taken again Weights & Biases keeps the first metrics; they are the same.
    """

    package = "wandb"
    remedy = "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"

    def __init__(self, directory: Path, name: str, config: dict[str, Any], first_step: int) -> None:
        module = __import__(self.package)
        options = self.options(directory, first_step)
        try:
            self.run = module.init(project="sbp-fast", name=name, config=config, **options)
        except getattr(module, "Error", ()) as error:  # what wandb raises itself, such as without a login
            problem = without_credentials(f"cannot begin a run: {error}")
            raise UserError(f"log.trackers: {self.package}", problem, self.remedy) from None

    def options(self, directory: Path, first_step: int) -> dict[str, Any]:
        """Return further arguments of `init`, and keep the id of a run that begins."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / WANDB_RUN
        if first_step == 0 or not path.is_file():
            write_json(path, {"id": uuid.uuid4().hex})
        return {"id": read_json(path)["id"], "resume": "allow", "dir": str(directory)}

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step."""
        self.run.log(metrics, step=step)

    def close(self) -> None:
        """End the run."""
        self.run.finish()


class Trackio(WeightsAndBiases):
    """A run of the project sbp-fast in trackio's local database; trackio has the interface of wandb, and no ids of runs."""

    package = "trackio"

    def options(self, directory: Path, first_step: int) -> dict[str, Any]:
        """Return further arguments of `init`: a resumed training goes on with the newest run of its name."""
        return {"resume": "allow" if first_step else "never"}


TRACKERS.register("tensorboard", TensorBoard)
TRACKERS.register("wandb", WeightsAndBiases)
TRACKERS.register("trackio", Trackio)


def open_trackers(names: Sequence[str], directory: Path, name: str, config: dict[str, Any], first_step: int) -> list[Tracker]:
    """Open a run in each of the named trackers.

    Args:
        names: keys of TRACKERS.
        directory: for their files; made where a tracker needs it.
        name: of the run.
        config: the configuration, without secrets.
        first_step: number of steps that earlier attempts have taken and saved.

    Raises:
        UserError: the package of a tracker is not installed, or the tracker refuses, such as without a login.
    """
    opened = []
    for tracker in names:
        try:
            opened.append(TRACKERS[tracker](directory, name, config, first_step))
        except ImportError as error:
            remedy = f"pip install {tracker}, or leave it out of log.trackers"
            raise UserError(f"log.trackers: {tracker}", f"cannot be used: {error}", remedy) from None
    return opened
