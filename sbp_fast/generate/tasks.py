"""How what is missing of a corpus gets drawn: by this process among others, or by workers that each hold the model."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.generate.backends.backend import Drawer, Drawers, check_backend, open_backend
from sbp_fast.generate.engine import Draft, Seed
from sbp_fast.generate.seeds import SeedPlan
from sbp_fast.generate.shard_writer import PARTS, Parts
from sbp_fast.model.saved import read_description
from sbp_fast.pipeline.distributed import Processes
from sbp_fast.pipeline.executors.executor import Advance, Place, Workers
from sbp_fast.pipeline.files import read_json, write_json
from sbp_fast.pipeline.progress import Console, Task, short
from sbp_fast.pipeline.stage import Work

CLOCK_SECONDS = 5.0
MOST_SHARDS = 32  # that a worker is given at once: as one chunk ends, its batch runs empty
VERSIONS = "drawn-by.json"
"""Versions of the packages that drew, where those are not this one: a list, one for each that was used between kills."""


def draw_here(config: RunConfig, parts: Parts, missing: list[int], model: Path, work: Work, processes: Processes) -> None:
    """Draw this process's share of the missing shards; all processes call this together."""
    scratch = work.directory / PARTS / "backend"
    drawers = open_backend(config, model, parts.prepared, scratch, processes)
    if processes.is_rank0:
        _keep_versions(work.directory, drawers.versions)
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in drawers.facts.items())
    work.console.say(f"{processes.world} process(es), each with {facts}")
    share = missing[processes.rank :: processes.world]
    whose = "documents drawn" if processes.world == 1 else "documents drawn by the first process"
    with work.console.task(whose, parts.documents(share), "documents", done=parts.drawn(share)) as task:
        _draw(parts, share, drawers, _Progress(task, work if processes.is_rank0 else None))


def draw_elsewhere(config: RunConfig, parts: Parts, missing: list[int], model: Path, work: Work, workers: Workers) -> None:
    """Have the missing shards drawn by workers that each hold the model."""
    make = partial(_Tool.open, config, model, parts.prepared.directory, work.directory)
    with workers.hold(make, config) as tools:
        work.device = tools.place.device
        check_backend(config, torch.device(work.device))
        work.console.say(f"{tools.count} process(es), each with {tools.place.device}, {tools.place.threads} threads")
        chunks = cut_chunks(missing, tools.count)
        with work.console.task("documents drawn", parts.documents(missing), "documents", parts.drawn(missing)) as task:
            for versions in tools.run(_draw_chunk, chunks, task.advance):
                _keep_versions(work.directory, versions)
                work.keep_clock()


def cut_chunks(shards: list[int], count: int) -> list[list[int]]:
    """What `count` workers are given one after the other: ever fewer shards, so that they end at about the same time."""
    chunks, start = list[list[int]](), 0
    while start < len(shards):
        size = min(MOST_SHARDS, max(1, (len(shards) - start) // (2 * count)))
        chunks.append(shards[start : start + size])
        start += size
    return chunks


@dataclass(frozen=True)
class _Tool:
    """What a worker holds: it can draw any shard."""

    parts: Parts
    drawers: Drawers

    @staticmethod
    def open(config: RunConfig, model: Path, corpus: Path, directory: Path, place: Place) -> _Tool:
        config = config.model_copy(update={"threads": place.threads})
        prepared, alone = PreparedCorpus(corpus), Processes(0, 1, torch.device(place.device))
        context = read_description(model)[0].context
        parts = Parts(directory, SeedPlan.make(config, prepared.unique, context), prepared, context)
        scratch = directory / PARTS / f"backend-{uuid.uuid4().hex[:8]}"  # of this worker alone
        return _Tool(parts, open_backend(config, model, prepared, scratch, alone))


def _draw_chunk(tool: _Tool, shards: list[int], advance: Advance) -> dict[str, str]:
    """Returns the versions of what draws."""
    missing = tool.parts.missing(shards)  # a worker that was lost may have finished some
    left = tool.parts.documents(missing) - tool.parts.drawn(missing)
    with Console(quiet=True).task("", left, "documents") as task:
        _draw(tool.parts, missing, tool.drawers, _Progress(task, None))
    advance(left)
    return tool.drawers.versions


def _draw(parts: Parts, shards: list[int], drawers: Drawers, progress: _Progress) -> None:
    """Draw what is missing of the shards, each drawer in a thread of its own."""
    seeds, threads = _Shared(parts.seeds(shards)), torch.get_num_threads()

    def drain(drawer: Drawer) -> None:
        torch.set_num_threads(drawers.threads)
        try:
            for draft in drawer.draw(seeds):
                parts.add(draft)
                progress(draft)
        except BaseException:
            seeds.stop()
            raise

    with ThreadPoolExecutor(len(drawers.members)) as pool:
        for finished in [pool.submit(drain, drawer) for drawer in drawers.members]:
            finished.result()
    torch.set_num_threads(threads)  # some libraries share the number among all threads


class _Shared:
    """Seeds that several threads take from, until one of them fails."""

    def __init__(self, seeds: Iterator[Seed]) -> None:
        self._seeds, self._lock, self._stopped = seeds, threading.Lock(), False

    def __iter__(self) -> Iterator[Seed]:
        return self

    def __next__(self) -> Seed:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._seeds)

    def stop(self) -> None:
        self._stopped = True


class _Progress:
    """Shows documents as they are over, with the rate of tokens; keeps the clock of `work`."""

    def __init__(self, task: Task, work: Work | None) -> None:
        self.task, self.work, self.tokens, self.lock = task, work, 0, threading.Lock()
        self.started = self.kept = time.monotonic()

    def __call__(self, draft: Draft) -> None:
        with self.lock:
            self.tokens += draft.drawn
            now = time.monotonic()
            self.task.advance(1, f"{short(self.tokens / (now - self.started))} tokens/s")
            if self.work is not None and now - self.kept > CLOCK_SECONDS:
                self.kept = now
                self.work.keep_clock()


def _keep_versions(directory: Path, versions: dict[str, str]) -> None:
    """Note what draws from here on."""
    known = versions_in(directory)
    if versions and versions not in known:
        write_json(directory / VERSIONS, [*known, versions])


def versions_in(directory: Path) -> list[dict[str, str]]:
    """What has drawn the documents in a directory, if it was not this package."""
    path = directory / VERSIONS
    return read_json(path) if path.is_file() else []
