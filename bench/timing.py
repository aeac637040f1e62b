"""Time of work on a CUDA device: launches queued behind a spin, so that the time the host takes to launch does not count.

A single launch on an idle stream measures the host: the device waits between the two events until the launch arrives. Here the
device spins first, the host queues the launches meanwhile, and the events enclose device work alone. Providers that synchronise
inside a run, which no queue and no CUDA graph can hide, are timed the same way and recorded as late.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

QUEUE_SECONDS = 0.02  # of device work in one queue; of a run longer than that there is one launch
MOST_LAUNCHES = 50
MOST_SPIN_SECONDS = 0.1
SPIN_CYCLES_A_SECOND = 2e9  # at least the clock of the device: a lower clock only lengthens the spin

Run = Callable[[], Any]


@dataclass(frozen=True)
class Pace:
    """How a provider is queued.

    Attributes:
        launches: runs in one queue.
        spin: seconds for which the device spins while the host queues them.
    """

    launches: int
    spin: float


def choose_pace(run: Run) -> Pace:
    """Run once, warm, and return as many launches as fill a queue, with a spin of twice the host's time to launch them."""
    start, stop = _events()
    torch.cuda.synchronize()
    started = time.perf_counter()
    start.record()
    run()
    stop.record()
    host = time.perf_counter() - started
    stop.synchronize()
    device = max(start.elapsed_time(stop) / 1e3, 1e-6)
    launches = max(1, min(MOST_LAUNCHES, int(QUEUE_SECONDS / device)))
    return Pace(launches, min(2 * host * launches, MOST_SPIN_SECONDS))


def queued_seconds(runs: Sequence[Run], pace: Pace) -> tuple[float, bool, Any]:
    """Time one queue.

    Args:
        runs: the same work on different inputs, which the launches take in turn, so that no cache keeps the inputs.
        pace: of the queue.

    Returns:
        Seconds of one run on the device, whether the host was still queueing when the spin ended, and the last run's output.
    """
    start, stop = _events()
    torch.cuda.synchronize()
    torch.cuda._sleep(int(pace.spin * SPIN_CYCLES_A_SECOND))
    start.record()
    output = None
    for launch in range(pace.launches):
        output = None  # frees the output of the run before
        output = runs[launch % len(runs)]()
    late = start.query()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / pace.launches, late, output


def _events() -> tuple[Any, Any]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
