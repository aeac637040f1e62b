"""The stage `synthesize`: new documents drawn after seeds, each once, by any number of processes."""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbp_fast.config import RunConfig, resolve_device
from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.corpus.shards import INDEX, Corpus
from sbp_fast.errors import UserError
from sbp_fast.files import read_json, write_json
from sbp_fast.model.flops import forward_flops
from sbp_fast.model.saved import read_description
from sbp_fast.progress import Console, Task, short
from sbp_fast.stage import Manifest, Work, run_stage
from sbp_fast.synthesize.backends import Drawer, Drawers, check_backend, open_backend
from sbp_fast.synthesize.engine import Draft, Seed
from sbp_fast.synthesize.parts import PARTS, Parts
from sbp_fast.synthesize.seeds import SeedPlan
from sbp_fast.train.processes import Processes, joined, led, world_size
from sbp_fast.workers.local import LOCAL
from sbp_fast.workers.workers import Advance, Place, Workers

CLOCK_SECONDS = 5.0
MOST_SHARDS = 32  # that an actor is given at once: as one chunk ends, its batch runs empty
VERSIONS = "drawn-by.json"
"""Versions of the packages that drew, where those are not this one: a list, one for each that was used between kills."""


def synthesize(
    config: RunConfig,
    out: Path,
    *,
    corpus: Path,
    model: Path,
    console: Console,
    force: bool = False,
    workers: Workers = LOCAL,
) -> Manifest | None:
    """Write a corpus of synthetic documents, enough for the joint run and what the filters will take.

    Its document table has the columns of any corpus and: seed (index into the unique corpus), sample (number of this document
    among its seed's), stop (why it is over: "end", "length", "repetition"), mean_log_probability (nats a token drawn, under
    the synthesizer at temperature 1).

    A process started by torchrun takes part with the others; workers that are not local draw in its stead. What our engine
    draws depends neither on how many there are nor on what an earlier attempt had drawn.

    Args:
        corpus: output of `prepare`.
        model: directory of the synthesizer.

    Returns:
        What the stage's manifest says; None in all processes but the first.

    Raises:
        UserError: a model that does not know the corpus's tokens; memory for less than one document; a backend that cannot
            run here; several processes and workers that are not local; what `run_stage` refuses.
    """
    if not workers.local and world_size() > 1:
        raise UserError("options", "several processes do not share a cluster", "leave out --gpus and torchrun, or --engine")
    with joined(resolve_device(config) if workers.local else "cpu") as processes:

        def body(work: Work) -> None:
            work.device = str(processes.device)
            _synthesize(config, PreparedCorpus(corpus), model, work, processes, workers)

        def lead(announce: Any) -> Manifest:
            def announced(work: Work) -> None:
                announce(work.directory)
                body(work)

            inputs: dict[str, Path | str] = {"corpus": corpus, "model": model}
            settings = what_it_depends_on(config)
            return run_stage("synthesize", out, config=settings, inputs=inputs, body=announced, console=console, force=force)

        def follow(directory: Path) -> None:
            body(Work(directory, out, {"corpus": corpus, "model": model}, Console(quiet=True)))

        return led(processes, lead, follow)


def what_it_depends_on(config: RunConfig) -> dict[str, Any]:
    """The settings that the documents depend on; how many are drawn together changes none."""
    without = {"batch_documents", "cache_gib", "vllm_python"}
    return {
        "seed": config.seed,
        "synthesize": config.synthesize.model_dump(mode="json", exclude=without),
        "joint": config.joint.model_dump(mode="json"),
        "pretrain": {"tokens": config.pretrain.tokens},
    }


def _synthesize(
    config: RunConfig, prepared: PreparedCorpus, model: Path, work: Work, processes: Processes, workers: Workers
) -> None:
    shape, vocabulary_size = read_description(model)
    if vocabulary_size != prepared.tokenizer.vocabulary_size:
        known = f"a vocabulary of {vocabulary_size}, the corpus {prepared.tokenizer.vocabulary_size}"
        raise UserError(model, f"has {known}", "give the synthesizer that was trained on this corpus")
    plan = SeedPlan.make(config, prepared.unique, shape.context)
    if not processes.tell((work.directory / INDEX).is_file()):  # with it, a killed attempt had only its parts left to remove
        if processes.leads and workers.local:
            check_backend(config, processes.device)
        parts = Parts(work.directory, plan, prepared, shape.context)
        missing = processes.tell(parts.missing())
        if missing and not workers.local:
            _draw_elsewhere(config, parts, missing, model, work, workers)
        elif missing:
            drawers = open_backend(config, model, prepared, work.directory / PARTS / "backend", processes)
            if processes.leads:
                _keep_versions(work.directory / VERSIONS, drawers.versions)
            _draw(plan, parts, missing[processes.rank :: processes.world], drawers, work, processes)
        processes.gather(None)
        if processes.leads:
            parts.join()
    if processes.leads:
        shutil.rmtree(work.directory / PARTS, ignore_errors=True)
        _record(config, plan, prepared, model, work)


def _keep_versions(path: Path, versions: dict[str, str]) -> None:
    """Note what draws from here on."""
    known = _versions(path)
    if versions and versions not in known:
        write_json(path, [*known, versions])


def _versions(path: Path) -> list[dict[str, str]]:
    return read_json(path) if path.is_file() else []


def _draw(plan: SeedPlan, parts: Parts, shards: list[int], drawers: Drawers, work: Work | None, processes: Processes) -> None:
    """Draw what is missing of this process's shards, each drawer in a thread of its own; in silence without `work`."""
    console = Console(quiet=True) if work is None else work.console
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in drawers.facts.items())
    console.say(f"{processes.world} process(es), each with {facts}")
    seeds, total = _Shared(parts.seeds(shards)), sum(len(plan.shards[shard]) for shard in shards) * plan.samples
    whose = "documents drawn" if processes.world == 1 else "documents drawn by the first process"
    with console.task(whose, total, "documents", done=parts.drawn(shards)) as task:
        progress = _Progress(task, work if processes.leads else None)

        def drain(drawer: Drawer) -> None:
            torch.set_num_threads(drawers.threads)
            try:
                for draft in drawer.draw(seeds):
                    parts.add(draft)
                    progress(draft)
            except BaseException:
                seeds.stop()
                raise

        threads = torch.get_num_threads()
        with ThreadPoolExecutor(len(drawers.members)) as pool:
            for finished in [pool.submit(drain, drawer) for drawer in drawers.members]:
                finished.result()
        torch.set_num_threads(threads)  # some libraries share the number among all threads


def _draw_elsewhere(config: RunConfig, parts: Parts, missing: list[int], model: Path, work: Work, workers: Workers) -> None:
    """Have what is missing drawn by workers that each hold the model."""
    make = partial(_Desk.open, config, model, parts.prepared.directory, work.directory)
    with workers.hold(make, config) as desks:
        work.device = desks.place.device
        check_backend(config, torch.device(work.device))
        work.console.say(f"{desks.count} process(es), each with {desks.place.device}, {desks.place.threads} threads")
        chunks = cut_chunks(missing, desks.count)
        total = sum(len(parts.plan.shards[shard]) for shard in missing) * parts.plan.samples
        with work.console.task("documents drawn", total, "documents", done=parts.drawn(missing)) as task:
            for versions in desks.run(_draw_chunk, chunks, task.advance):
                _keep_versions(work.directory / VERSIONS, versions)
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
class _Desk:
    """What it takes to draw any shard."""

    parts: Parts
    drawers: Drawers
    processes: Processes

    @staticmethod
    def open(config: RunConfig, model: Path, corpus: Path, directory: Path, place: Place) -> _Desk:
        config = config.model_copy(update={"threads": place.threads})
        prepared, processes = PreparedCorpus(corpus), Processes(0, 1, torch.device(place.device))
        context = read_description(model)[0].context
        parts = Parts(directory, SeedPlan.make(config, prepared.unique, context), prepared, context)
        scratch = directory / PARTS / f"backend-{uuid.uuid4().hex[:8]}"  # of this actor alone
        drawers = open_backend(config, model, prepared, scratch, processes)
        return _Desk(parts, drawers, processes)


def _draw_chunk(desk: _Desk, shards: list[int], advance: Advance) -> dict[str, str]:
    """Returns the versions of what draws."""
    plan, parts = desk.parts.plan, desk.parts
    missing = parts.missing(shards)  # an actor that was lost may have finished some
    left = sum(len(plan.shards[shard]) for shard in missing) * plan.samples - parts.drawn(missing)
    _draw(plan, parts, missing, desk.drawers, None, desk.processes)
    advance(left)
    return desk.drawers.versions


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
    """Shows documents as they are over, with the rate of tokens."""

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


def _record(config: RunConfig, plan: SeedPlan, prepared: PreparedCorpus, model: Path, work: Work) -> None:
    written = Corpus(work.directory)
    stops, lengths = written.column("stop"), np.diff(written.offsets) - 2
    drawn = lengths + (stops == "end")
    log_probabilities = written.column("mean_log_probability")
    settings = config.synthesize
    work.record(
        documents=len(written),
        tokens=written.tokens,
        seeds=len(plan.documents),
        samples_per_seed=plan.samples,
        stops={str(name): int(number) for name, number in zip(*np.unique(stops, return_counts=True), strict=True)},
        finished_share=float((stops == "end").mean()),
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        backend=settings.backend,
        backend_versions=_versions(work.directory / VERSIONS),
        reproducible=settings.backend == "engine",
        mean_tokens=float(lengths.mean()),
        mean_log_probability=float((log_probabilities * drawn).sum() / drawn.sum()),
    )
    shape, vocabulary_size = read_description(model)
    seeds = np.minimum(np.diff(prepared.unique.offsets), shape.context)
    prefilled = seeds[plan.documents]
    pairs = (prefilled * (prefilled + 1) // 2).sum() + (drawn * np.repeat(prefilled, plan.samples)).sum()
    pairs += (drawn * (drawn + 1) // 2).sum()
    tokens = prefilled.sum() + drawn.sum()
    work.flops = forward_flops(shape, vocabulary_size, float(tokens), float(pairs), float(drawn.sum()))
