"""A trace of chosen steps, and on CUDA a snapshot of the memory that they took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sbp_fast.errors import UserError


class Profile:
    """Records the steps of a range like "10:13" (the last one left out) into `directory`; None records nothing.

    Writes `trace.json.gz`, for Perfetto or chrome://tracing, and `memory.pickle`, for pytorch.org/memory_viz.

    Raises:
        UserError: a range that is none.
    """

    def __init__(self, steps: str | None, directory: Path, device: torch.device) -> None:
        self.range, self.directory, self.cuda = parse_range(steps), directory, device.type == "cuda"
        self._profile: Any = None

    def begin(self, step: int) -> None:
        """Call before `step`."""
        if step in self.range and self._profile is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
            if self.cuda:
                torch.cuda.memory._record_memory_history(max_entries=1_000_000)

    def end(self, step: int) -> None:
        """Call after `step`."""
        if self._profile is not None and step + 1 >= self.range.stop:
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.cuda:
                torch.cuda.memory._dump_snapshot(str(self.directory / "memory.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
            self._profile.stop()
            self._profile.export_chrome_trace(str(self.directory / "trace.json.gz"))
            self._profile = None


def parse_range(text: str | None) -> range:
    """ "10:13" as range(10, 13); nothing as an empty one."""
    if text is None:
        return range(0)
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"--profile {text}", "is no range of steps", "write it as FIRST:LAST, such as 10:13")
    return range(int(first), int(last))
