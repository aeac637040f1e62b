"""Sharded checkpoints, written in the background, from which a killed run resumes.

    checkpoints/step-00000120/__0_0.distcp ...  .metadata     written by torch.distributed.checkpoint
    checkpoints/step-00000120/complete.json                   written last: the checksum of every file, and of the logs so far,
                                                              and the running totals

A checkpoint without its marker, complete.json, is unfinished and ignored. A checkpoint whose files do not match the marker is
damaged: it is removed, and the one before it is loaded. Checkpoints can be read by any number of processes in any mesh.
"""

from __future__ import annotations

import re
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from sbp_fast.config import CheckpointConfig
from sbp_fast.errors import UserError
from sbp_fast.pipeline.distributed import Processes
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.seals import begins_whole, fingerprint_file, is_whole, read_sealed_json, write_sealed_json
from sbp_fast.train.checkpoint_reader import CheckpointPlanner, CheckpointReader, cause_of_failure
from sbp_fast.train.optimizer import Optimizers

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # raised by every single-process run

CHECKPOINTS, MARKER = "checkpoints", "complete.json"
FORMAT = 3  # 1: before validation points; 2: before the hash of the marker
TRAIN_AGAIN = "remove the .partial directory and train again"


class Checkpoints:
    """The checkpoints of one run; every method is called by all of its processes together.

    Args:
        directory: directory of the checkpoints, on a file system that all processes see.
        config: how many checkpoints to keep.
        processes: this process and its process groups.
        console: where a damaged checkpoint is reported.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, processes: Processes, console: Console) -> None:
        self.directory, self.config, self.processes, self.console = directory, config, processes, console
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest sound checkpoint and the content of its marker; None if there is none.

        Damaged checkpoints are reported on the console and removed, so that they do not count among those to keep.
        """
        for path in map(Path, reversed(self.processes.broadcast([str(path) for path in self._finished()]))):
            marker, damaged = self._read(path)
            if marker is not None and not damaged:
                return path, marker
            if self.processes.is_rank0:
                self.console.say(f"checkpoint {path.name} is damaged ({', '.join(damaged)}): going back to the one before")
                (path / MARKER).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)
        return None

    def find(self, step: int) -> Path:
        """Return the checkpoint of the state after `step` steps.

        Raises:
            UserError: it is missing or damaged.
        """
        self.wait()
        path = self._path(step)
        is_whole = self.processes.broadcast((path / MARKER).is_file())  # of rank 0, which has written it by now
        if not is_whole or self._read(path)[1]:
            raise UserError(path, "the checkpoint of the selected weights is missing or damaged", TRAIN_AGAIN)
        return path

    def load(self, path: Path, model: nn.Module, optimizers: Optimizers) -> None:
        """Restore weights and optimizers from a checkpoint.

        Random number generators are restored too where the number of processes is that of the checkpoint.

        Raises:
            UserError: the checkpoint holds more than tensors and plain values.
        """
        state = self._state(model, optimizers)
        if read_sealed_json(path / MARKER, TRAIN_AGAIN)["processes"] != self.processes.world:
            del state["random"]
        single, group = self.processes.world == 1, self.processes.group
        with cause_of_failure():
            dcp.load(
                state, storage_reader=CheckpointReader(path), planner=CheckpointPlanner(), process_group=group, no_dist=single
            )
        set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for name, value in state.get("random", {}).items():
            (torch.cuda if name.endswith("cuda") else torch).set_rng_state(value)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: Optimizers,
        totals: dict[str, Any],
        selected: int,
        logs: Mapping[str, dict[str, Any]] | None = None,
    ) -> float:
        """Begin a checkpoint of the state after `step` steps; it is written in the background.

        Args:
            step: number of steps done.
            model: the model.
            optimizers: its optimizers.
            totals: stored in the marker.
            selected: the checkpoint after this many steps, if there is one, stays as long as this one.
            logs: checksums of the files beside the directory of checkpoints that a resumed run goes on writing.

        Returns:
            Seconds that training waited for an earlier checkpoint to be finished and for the state to be copied.
        """
        started = time.monotonic()
        self.wait()
        path = self._path(step)
        if self.processes.is_rank0:
            shutil.rmtree(path, ignore_errors=True)  # unfinished, or damaged
            self.directory.mkdir(exist_ok=True)
        self.processes.broadcast()
        single = self.processes.world == 1
        group = self.processes.checkpoint_group
        saving = dcp.async_save(self._state(model, optimizers), checkpoint_id=path, process_group=group, no_dist=single)
        assert isinstance(saving, Future)
        world = self.processes.world
        marker: dict[str, Any] = {"format": FORMAT, "step": step, "processes": world, "totals": totals, "selected": selected}
        marker["logs"] = dict(logs or {})
        self._pending = self._pool.submit(self._finish, saving, path, marker)
        return time.monotonic() - started

    def wait(self) -> None:
        """Wait until the checkpoint being written is whole on disk; raise the error that it failed with."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()  # finishes the checkpoint that is being written, also when a run fails

    def clear(self, keep_in: Path) -> None:
        """Move the checkpoints that stay for good to `keep_in` and delete the rest; called after a finished run."""
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
        """Hash the files that each process wrote, write the marker, then delete old checkpoints; runs in the background."""
        with cause_of_failure():
            saving.result()
        own_files = path.glob(f"__{self.processes.rank}_*")
        files = {file.name: fingerprint_file(file) for file in own_files}
        if self.processes.world > 1:
            files_by_rank: list[Any] = [None] * self.processes.world
            dist.all_gather_object(files_by_rank, files, group=self.processes.checkpoint_group)
            files = {name: fingerprint for files in files_by_rank for name, fingerprint in files.items()}
        if self.processes.is_rank0:
            files[".metadata"] = fingerprint_file(path / ".metadata")
            write_sealed_json(path / MARKER, {**marker, "files": files})
            for old in self._superseded():
                (old / MARKER).unlink()  # first, so that a half-deleted checkpoint counts as unfinished, not as damaged
                shutil.rmtree(old)

    def _finished(self) -> list[Path]:
        return sorted(marker.parent for marker in self.directory.glob(f"step-*/{MARKER}"))

    def _superseded(self) -> list[Path]:
        """Return the old checkpoints that nothing needs: neither the setting of how many stay, nor a younger one's choice."""
        finished = self._finished()
        old = [path for path in finished if not self._stays(path)][: -self.config.keep]
        needing = [_read_marker(path) for path in finished if path not in old]
        selected = {self._path(marker["selected"]) for marker in needing if marker is not None}
        return [path for path in old if path not in selected]

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _stays(self, path: Path) -> bool:
        every = self.config.keep_every_steps
        return every > 0 and int(re.sub(r"\D", "", path.name)) % every == 0

    def _read(self, path: Path) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the marker, and the files that differ from what was written; each process checks its share of them."""
        marker = _read_marker(path)
        if marker is None:
            return None, [MARKER]
        if marker["format"] != FORMAT:
            return marker, [f"format {marker['format']} is not {FORMAT}"]
        share = sorted(marker["files"].items())[self.processes.rank :: self.processes.world]
        damaged = [name for name, expected in share if not is_whole(path / name, expected)]
        damaged += [name for name, begin in marker["logs"].items() if not begins_whole(self.directory.parent / name, begin)]
        return marker, [name for names in self.processes.gather(damaged) for name in names]


def _read_marker(path: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint's marker; None if it is not as it was written."""
    try:
        return read_sealed_json(path / MARKER, TRAIN_AGAIN)
    except UserError:
        return None
