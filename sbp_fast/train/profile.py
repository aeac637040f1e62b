"""Profiles of chosen steps: a trace and, on CUDA, a memory snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sbp_fast.errors import UserError


class Profile:
    """Profiles a range of steps.

    Writes `trace.json.gz`, for Perfetto or chrome://tracing, and on CUDA `memory.pickle`, for pytorch.org/memory_viz.

    Args:
        steps: "FIRST:LAST", the last step excluded, such as "10:13"; None profiles nothing.
        directory: directory for the files.
        device: device of the run.

    Raises:
        UserError: `steps` is not a range.
    """

    def __init__(self, steps: str | None, directory: Path, device: torch.device) -> None:
        self.range, self.directory, self.cuda = parse_range(steps), directory, device.type == "cuda"
        self._profile: Any = None

    def begin(self, step: int) -> None:
        """Start profiling if `step` is the first of the range; called before each step."""
        if step in self.range and self._profile is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
            if self.cuda:
                torch.cuda.memory._record_memory_history(max_entries=1_000_000)

    def end(self, step: int) -> None:
        """Stop profiling and write the files if `step` is the last of the range; called after each step."""
        if self._profile is not None and step + 1 >= self.range.stop:
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.cuda:
                torch.cuda.memory._dump_snapshot(str(self.directory / "memory.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
            self._profile.stop()
            self._profile.export_chrome_trace(str(self.directory / "trace.json.gz"))
            self._profile = None


def parse_range(text: str | None) -> range:
    """Return the steps of a range such as "10:13", which is range(10, 13); None gives an empty range."""
    if text is None:
        return range(0)
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"--profile {text}", "is no range of steps", "write it as FIRST:LAST, such as 10:13")
    return range(int(first), int(last))
