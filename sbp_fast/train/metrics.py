"""What is counted and measured in a run: figures kept on the device until they are read, totals, and speed."""

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

RECENT = 128  # steps whose losses a spike is told by


@dataclass
class Totals(Counts):
    """Sums over the steps so far, and what the next line of metrics will be made of; saved with every checkpoint.

    Attributes:
        skipped_in_a_row: steps up to the last one that were not finite.
        rolled_back_steps: whose updates a rollback has undone.
        pending: (step, loss, gradient norm) of each step since the last line; null where they were not finite.
        since: what was read since the last line.
        recent: losses of the last finite steps.
    """

    steps: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    rolled_back_steps: int = 0
    loop_seconds: float = 0.0
    since: Counts = field(default_factory=Counts)
    pending: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    @staticmethod
    def of(saved: dict[str, Any]) -> Totals:
        """From what `dataclasses.asdict` made of one."""
        return Totals(**{**saved, "since": Counts(**saved["since"])})

    def step(self, loss: float, norm: float) -> None:
        """Count one step by its loss and gradient norm, read from the device."""
        finite = loss - loss == 0 and norm - norm == 0
        self.pending.append((self.steps, loss, norm) if finite else (self.steps, None, None))
        self.steps += 1
        self.skipped_steps += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.recent = [*self.recent, loss][-RECENT:] if finite else self.recent


class DeviceFigures:
    """Loss and gradient norm of the steps since the last `read`, which alone waits for the device."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def keep(self, loss: Tensor, norm: Tensor) -> None:
        self._kept.append(torch.stack([loss.double(), norm.double()]))

    def read(self) -> list[list[float]]:
        values = torch.stack(self._kept).tolist() if self._kept else []
        self._kept.clear()
        return values


def mean_figures(pending: Sequence[tuple[int, float | None, float | None]]) -> tuple[float | None, float | None]:
    """Mean loss and gradient norm of the finite steps; (None, None) if there is none."""
    finite = [(loss, norm) for _, loss, norm in pending if loss is not None and norm is not None]
    if not finite:
        return None, None
    return sum(loss for loss, _ in finite) / len(finite), sum(norm for _, norm in finite) / len(finite)


@dataclass
class Clock:
    """Where the time of a line goes.

    Attributes:
        steps: since the last line.
        waited: seconds for data, by this process.
        stalled: seconds for checkpoints.
    """

    started: float = field(default_factory=time.monotonic)
    steps: int = 0
    waited: float = 0.0
    stalled: float = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def speed(
    clock: Clock, counts: Counts, model: ModelConfig, vocabulary_size: int, devices: int, device: torch.device
) -> dict[str, Any]:
    """The keys perf/..., of all processes together unless they say "per device"; MFU is null where the peak is unknown.

    Args:
        counts: what all processes read in the time of `clock`.
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
    """Most bytes held so far: by torch on a CUDA device, by the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
