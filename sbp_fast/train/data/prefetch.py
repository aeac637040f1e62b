"""Packed sequences made ahead of time by one thread and copied to the device, so that training does not wait for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from sbp_fast.train.data.batches import Batches, PackedBatch, divide_sequences

AHEAD = 4  # packed sequences made or being made


class Prefetch:
    """This process's packed sequences of every step from `first_step` on.

    Args:
        batches: of the run.
        first_step: where training starts.
        device: where the sequences go.
        rank: of this process among those that train together.
        world: the number of those processes.
        head_width: of the model's attention; None for the commonest.

    Attributes:
        waited: seconds that the training thread has waited for a sequence, since it was last set to zero.

    Raises:
        ValueError: the sequences of a step cannot be divided equally.
    """

    def __init__(
        self, batches: Batches, first_step: int, *, device: torch.device, rank: int, world: int, head_width: int | None = None
    ) -> None:
        self.batches, self.device, self.head_width, self.waited = batches, device, head_width, 0.0
        self.indices = divide_sequences(batches.sequences_per_step, world)[rank]
        self._next = (first_step, self.indices.start)
        self._pool = ThreadPoolExecutor(1, "batches")
        self._queue: deque[Future[PackedBatch]] = deque()

    def step(self) -> Iterator[PackedBatch]:
        """Yield the packed sequences of the next step, on the device."""
        for _ in self.indices:
            self._fill()
            started = time.monotonic()
            sequence = self._queue.popleft().result()
            self.waited += time.monotonic() - started
            self._fill()
            yield sequence

    def _fill(self) -> None:
        while len(self._queue) < AHEAD and self._next[0] < self.batches.steps:
            step, index = self._next
            self._queue.append(self._pool.submit(self._make, step, index))
            self._next = (step, index + 1) if index + 1 < self.indices.stop else (step + 1, self.indices.start)

    def _make(self, step: int, index: int) -> PackedBatch:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # copies go to its default stream, as training does
        return self.batches.sequence(step, index).to(self.device, head_width=self.head_width)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
