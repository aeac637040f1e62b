"""Counts and measurements of a run: loss and gradient norm, totals, speed and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sbp_fast.config import ModelConfig
from sbp_fast.model.flops import palm_flops, peak_flops, training_flops
from sbp_fast.train.data.batches import Counts

RECENT = 128  # number of losses that decide whether the last one is a spike


@dataclass
class Totals(Counts):
    """Sums over the steps so far, and the figures for the next line of metrics; saved with every checkpoint.

    Attributes:
        skipped_steps: number of steps whose loss or gradient norm was not finite.
        skipped_in_a_row: number of such steps at the end.
        rolled_back_steps: number of steps whose updates a rollback has undone.
        loop_seconds: wall-clock seconds in the training loop, over all attempts.
        validation_seconds: those of them that validation points took.
        pending: (step, loss, gradient norm) of each step since the last line; None where they were not finite.
        since: counts of what was read since the last line.
        recent: losses of the last finite steps, at most RECENT.
        validations: (steps done, held-out loss) of each validation point; the loss is None where it was not finite.
    """

    steps: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    rolled_back_steps: int = 0
    loop_seconds: float = 0.0
    validation_seconds: float = 0.0
    since: Counts = field(default_factory=Counts)
    pending: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    validations: list[tuple[int, float | None]] = field(default_factory=list)

    @staticmethod
    def of(saved: dict[str, Any]) -> Totals:
        """Return the totals that `dataclasses.asdict` turned into `saved`."""
        return Totals(**{**saved, "since": Counts(**saved["since"])})

    def step(self, loss: float, norm: float) -> None:
        """Count one step with its loss and gradient norm."""
        finite = loss - loss == 0 and norm - norm == 0
        self.pending.append((self.steps, loss, norm) if finite else (self.steps, None, None))
        self.steps += 1
        self.skipped_steps += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.recent = [*self.recent, loss][-RECENT:] if finite else self.recent


class DeviceFigures:
    """Loss and gradient norm of the steps since the last `read`, on the device until then."""

    def __init__(self) -> None:
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Add the figures of a step, without host-device synchronisation."""
        self._unread.append(torch.stack([loss.double(), norm.double()]))

    def read(self) -> list[list[float]]:
        """Return [loss, gradient norm] of each step since the last call; synchronises with the device."""
        values = torch.stack(self._unread).tolist() if self._unread else []
        self._unread.clear()
        return values


def mean_figures(pending: Sequence[tuple[int, float | None, float | None]]) -> tuple[float | None, float | None]:
    """Return the mean loss and gradient norm of the finite steps; (None, None) if there is none."""
    finite = [(loss, norm) for _, loss, norm in pending if loss is not None and norm is not None]
    if not finite:
        return None, None
    return sum(loss for loss, _ in finite) / len(finite), sum(norm for _, norm in finite) / len(finite)


@dataclass
class Clock:
    """Wall-clock time of the steps of one line of metrics.

    Attributes:
        started: monotonic time at which the line began, in seconds.
        steps: number of steps since the last line.
        waited: seconds that this process waited for data.
        stalled: seconds that training waited for checkpoints.
    """

    started: float = field(default_factory=time.monotonic)
    steps: int = 0
    waited: float = 0.0
    stalled: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the line began."""
        return time.monotonic() - self.started


def speed(
    clock: Clock, counts: Counts, model: ModelConfig, vocabulary_size: int, devices: int, device: torch.device
) -> dict[str, Any]:
    """Return the metrics perf/..., summed over all processes unless the key says "per device".

    MFU is None where the peak of the device is unknown.

    Args:
        clock: time of the steps of the line.
        counts: counts of what all processes read in the time of `clock`.
        model: shape of the model.
        vocabulary_size: vocabulary size of the model.
        devices: number of devices that train together.
        device: device of this process.
    """
    seconds, steps = clock.seconds, max(clock.steps, 1)
    flops = training_flops(model, vocabulary_size, counts.tokens, counts.visible_pairs, counts.loss_tokens)
    usual = palm_flops(model, vocabulary_size, counts.tokens, model.context)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    available = None if peak is None else peak * devices * seconds
    return {
        "perf/tokens_per_second": counts.tokens / seconds,
        "perf/tokens_per_second_per_device": counts.tokens / seconds / devices,
        "perf/loss_tokens_per_second": counts.loss_tokens / seconds,
        "perf/flops_per_second": flops / seconds,
        "perf/mfu": None if available is None else flops / available,
        "perf/mfu_usual_formula": None if available is None else usual / available,
        "perf/step_seconds": seconds / steps,
        "perf/data_wait_seconds": clock.waited / steps,
        "perf/checkpoint_stall_seconds": clock.stalled,
        "perf/memory_gib_per_device": peak_memory(device) / 2**30,
    }


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of torch on a CUDA device, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
