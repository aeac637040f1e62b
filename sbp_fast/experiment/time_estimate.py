"""Expected seconds of stages on this machine, which each finished stage corrects."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from sbp_fast.config import RunConfig, resolve_device, resolve_threads
from sbp_fast.errors import UserError
from sbp_fast.experiment.costs import CorpusEstimate, Cost
from sbp_fast.experiment.graph import PREPARE, Stage
from sbp_fast.model.flops import DEVICE_NAMES
from sbp_fast.pipeline.manifest import MANIFEST, Manifest
from sbp_fast.pipeline.progress import duration

SHARE = 0.4  # of a card's peak that the plan assumes too
COMMANDS = {"tune": "train"}
"""Commands whose stages call themselves otherwise in their manifests, where speeds are measured."""


class TimeEstimate:
    """Expected seconds of stages on this machine.

    The speed is that of finished stages of the same kind; until there are any, on a GPU it is the plan's. The size of the
    corpus is guessed until `prepare` has counted it.

    Args:
        config: of the run; it names the device.
        finished: manifests of finished stages.
        gpus: processes that share the work of a GPU.
    """

    def __init__(self, config: RunConfig, finished: Iterable[Manifest], gpus: int) -> None:
        self.card, self.gpus, self.threads = _card(config), gpus, resolve_threads(config)
        self.corpus = CorpusEstimate.guess(config)
        flops, seconds = defaultdict[str, float](float), defaultdict[str, float](float)
        for manifest in finished:
            flops[manifest.stage] += manifest.flops
            seconds[manifest.stage] += manifest.seconds
            if manifest.stage == PREPARE:
                self.corpus = CorpusEstimate.of_counts(config, manifest.counts)
        self.rates = {stage: flops[stage] / seconds[stage] for stage in flops if flops[stage] and seconds[stage]}

    def of_stage(self, stage: Stage) -> float | None:
        """Return the expected seconds of a stage of the run; None where no speed is known."""
        command = stage.name.partition("/")[0]
        return self.of_cost(COMMANDS.get(command, command), self.cost(stage))

    def cost(self, stage: Stage) -> Cost:
        """Return the cost of a stage of the run."""
        return stage.cost(stage.config, self.corpus)

    def of_cost(self, kind: str, cost: Cost) -> float | None:
        """Return the expected seconds of a stage of a kind, as manifests name it; None where no speed is known."""
        seconds = cost.core_seconds / self.threads
        if not cost.flops:
            return seconds
        if kind in self.rates:
            return seconds + cost.flops / self.rates[kind]
        return seconds + 3600 * cost.gpu_hours(self.card, SHARE) / self.gpus if self.card else None


def _card(config: RunConfig) -> str:
    """Return the name of the GPU as the plan knows it; "" for others and for the CPU."""
    import torch

    device = resolve_device(config)
    return DEVICE_NAMES.get(torch.cuda.get_device_name(device), "") if device.startswith("cuda") else ""


def describe_sum(seconds: Iterable[float | None], at_a_time: int = 1) -> str:
    """Return the time of several stages for people, and how many there are whose time is not known.

    Args:
        seconds: of each stage; None where it is not known.
        at_a_time: so many stages run side by side.
    """
    expected = list(seconds)
    known = [each for each in expected if each is not None]
    unknown, total = len(expected) - len(known), math.fsum(known) / at_a_time
    if not unknown:
        return duration(total)
    least = f"at least {duration(total)}, not counting" if round(total) else "not known yet:"
    return f"{least} {unknown} {'stage' if unknown == 1 else 'stages'} of unknown speed"


def read_finished(directory: Path) -> Manifest | None:
    """Return the manifest of a stage's directory, without a look at its files; None where no finished stage is."""
    if not (directory / MANIFEST).is_file():
        return None
    try:
        return Manifest.read(directory)
    except UserError:  # the stage itself refuses it, and says why
        return None
