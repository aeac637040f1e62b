"""What a killed run resumes from: sharded checkpoints, written in the background, each finished by a marker.

    checkpoints/step-00000120/__0_0.distcp ...  .metadata     written by torch.distributed.checkpoint
    checkpoints/step-00000120/complete.json                   last: the checksum of every file, and the running totals

A directory without its marker was cut short and counts for nothing. One whose files do not match it is damaged, and the one
before is taken. Any number of processes, in any mesh, can read what any other wrote.
"""

from __future__ import annotations

import re
import shutil
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from sbp_fast.config import CheckpointConfig
from sbp_fast.pipeline.distributed import Processes
from sbp_fast.pipeline.files import hash_file, read_json, write_json
from sbp_fast.pipeline.progress import Console
from sbp_fast.train.optimizer import Optimizers

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it says so of every process that is alone

CHECKPOINTS, MARKER = "checkpoints", "complete.json"
FORMAT = 1


class Checkpoints:
    """The checkpoints of one run; every method is called by all of its processes together.

    Args:
        directory: where they lie, on a file system that all processes see.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, processes: Processes, console: Console) -> None:
        self.directory, self.config, self.processes, self.console = directory, config, processes, console
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest sound checkpoint and what its marker holds; damaged ones are named and passed over."""
        for path in reversed(self.processes.broadcast([str(path) for path in self._finished()])):
            marker = read_json(Path(path) / MARKER)
            damaged = self._damaged(Path(path), marker)
            if not damaged:
                return Path(path), marker
            if self.processes.is_rank0:
                self.console.say(
                    f"checkpoint {Path(path).name} is damaged ({', '.join(damaged)}): going back to the one before"
                )
        return None

    def load(self, path: Path, model: nn.Module, optimizers: Optimizers) -> None:
        """Put weights, optimizers and, with as many processes as wrote it, random number generators where they were."""
        state = self._state(model, optimizers)
        if read_json(path / MARKER)["processes"] != self.processes.world:
            del state["random"]
        dcp.load(state, checkpoint_id=path, process_group=self.processes.group, no_dist=self.processes.world == 1)
        set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for name, value in state.get("random", {}).items():
            (torch.cuda if name.endswith("cuda") else torch).set_rng_state(value)

    def save(self, step: int, model: nn.Module, optimizers: Optimizers, totals: dict[str, Any]) -> float:
        """Write the state after `step` steps in the background.

        Returns:
            Seconds for which training stood still: for an earlier one to end, and to copy the state.
        """
        started = time.monotonic()
        self.wait()
        path = self.directory / f"step-{step:08d}"
        if self.processes.is_rank0:
            shutil.rmtree(path, ignore_errors=True)  # cut short, or damaged
            self.directory.mkdir(exist_ok=True)
        self.processes.broadcast()
        alone = self.processes.world == 1
        group = self.processes.checkpoint_group
        saving = dcp.async_save(self._state(model, optimizers), checkpoint_id=path, process_group=group, no_dist=alone)
        assert isinstance(saving, Future)
        marker = {"format": FORMAT, "step": step, "processes": self.processes.world, "totals": totals}
        self._pending = self._pool.submit(self._finish, saving, path, marker)
        return time.monotonic() - started

    def wait(self) -> None:
        """Return when the last one is whole on disk, or raise what it failed with."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()  # what is being written when a run ends or fails is still finished

    def clear(self, keep_in: Path) -> None:
        """After a finished run: move those that stay to `keep_in`, and drop the rest."""
        self.wait()
        if self.processes.is_rank0 and self.directory.is_dir():
            for path in filter(self._stays, self._finished()):
                keep_in.mkdir(exist_ok=True)
                shutil.rmtree(keep_in / path.name, ignore_errors=True)
                path.rename(keep_in / path.name)
            shutil.rmtree(self.directory)

    def _state(self, model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
        weights, optimizer = get_state_dict(model, optimizers)
        random = {f"{self.processes.rank}.cpu": torch.get_rng_state()}
        if self.processes.device.type == "cuda":
            random[f"{self.processes.rank}.cuda"] = torch.cuda.get_rng_state()
        return {"model": weights, "optimizer": optimizer, "random": random}

    def _finish(self, saving: Future[Any], path: Path, marker: dict[str, Any]) -> None:
        """In the background: check sums of what each process wrote, then the marker, then what may go."""
        try:
            saving.result()
        except dcp.CheckpointException as failed:  # what went wrong, such as a full disk, and not that something did
            raise next(iter(failed.failures.values()))[0] from failed
        mine = path.glob(f"__{self.processes.rank}_*")
        files = {file.name: _facts(file) for file in mine}
        if self.processes.world > 1:
            parts: list[Any] = [None] * self.processes.world
            dist.all_gather_object(parts, files, group=self.processes.checkpoint_group)
            files = {name: facts for part in parts for name, facts in part.items()}
        if self.processes.is_rank0:
            files[".metadata"] = _facts(path / ".metadata")
            write_json(path / MARKER, {**marker, "files": files})
            for old in [old for old in self._finished() if not self._stays(old)][: -self.config.keep]:
                (old / MARKER).unlink()  # first, so that a half-deleted one is never taken for a damaged one
                shutil.rmtree(old)

    def _finished(self) -> list[Path]:
        return sorted(marker.parent for marker in self.directory.glob(f"step-*/{MARKER}"))

    def _stays(self, path: Path) -> bool:
        every = self.config.keep_every_steps
        return every > 0 and int(re.sub(r"\D", "", path.name)) % every == 0

    def _damaged(self, path: Path, marker: dict[str, Any]) -> list[str]:
        """Files that are not as they were written; each process looks at its share of them."""
        if marker.get("format") != FORMAT:
            return [f"format {marker.get('format')} is not {FORMAT}"]
        mine = sorted(marker["files"].items())[self.processes.rank :: self.processes.world]
        wrong = [name for name, facts in mine if not (path / name).is_file() or _facts(path / name) != facts]
        return [name for part in self.processes.gather(wrong) for name in part]


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3": hash_file(path)}
