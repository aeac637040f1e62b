"""Batches made ahead of time by one thread, and copied to the device, so that training never waits for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from sbp_fast.pipeline.distributed import Processes
from sbp_fast.train.data.batches import Batches, PackedBatch, share_out

AHEAD = 4  # streams made or being made


class Prefetch:
    """This process's streams of every step from `first_step` on.

    Attributes:
        waited: seconds that somebody stood waiting for a stream, since it was last set to zero.

    Raises:
        ValueError: streams that cannot be shared out equally.
    """

    def __init__(self, batches: Batches, first_step: int, processes: Processes) -> None:
        self.batches, self.device, self.waited = batches, processes.device, 0.0
        self.numbers = share_out(batches.streams_per_step, processes.world)[processes.rank]
        self._next = (first_step, self.numbers.start)
        self._pool = ThreadPoolExecutor(1, "batches")
        self._queue: deque[Future[PackedBatch]] = deque()

    def step(self) -> Iterator[PackedBatch]:
        """The streams of the next step, on the device."""
        for _ in self.numbers:
            self._fill()
            started = time.monotonic()
            stream = self._queue.popleft().result()
            self.waited += time.monotonic() - started
            self._fill()
            yield stream

    def _fill(self) -> None:
        while len(self._queue) < AHEAD and self._next[0] < self.batches.steps:
            step, number = self._next
            self._queue.append(self._pool.submit(self._make, step, number))
            self._next = (step, number + 1) if number + 1 < self.numbers.stop else (step + 1, self.numbers.start)

    def _make(self, step: int, number: int) -> PackedBatch:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # the copies go to its default stream, as the training does
        return self.batches.stream(step, number).to(self.device)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
