"""The stage `synthesize`: new documents drawn after seeds, each once, by any number of processes."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from sbp_fast.train.processes import Processes, joined, led

CLOCK_SECONDS = 5.0
VERSIONS = "drawn-by.json"
"""Versions of the packages that drew, where those are not this one: a list, one for each that was used between kills."""


def synthesize(
    config: RunConfig, out: Path, *, corpus: Path, model: Path, console: Console, force: bool = False
) -> Manifest | None:
    """Write a corpus of synthetic documents, enough for the joint run and what the filters will take.

    Its document table has the columns of any corpus and: seed (index into the unique corpus), sample (number of this document
    among its seed's), stop (why it is over: "end", "length", "repetition"), mean_log_probability (nats a token drawn, under
    the synthesizer at temperature 1).

    A process started by torchrun takes part with the others. What our engine draws depends neither on how many there are nor on
    what an earlier attempt had drawn.

    Args:
        corpus: output of `prepare`.
        model: directory of the synthesizer.

    Returns:
        What the stage's manifest says; None in all processes but the first.

    Raises:
        UserError: a model that does not know the corpus's tokens; memory for less than one document; a backend that cannot
            run here; what `run_stage` refuses.
    """
    with joined(resolve_device(config)) as processes:

        def body(work: Work) -> None:
            work.device = str(processes.device)
            _synthesize(config, PreparedCorpus(corpus), model, work, processes)

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


def _synthesize(config: RunConfig, prepared: PreparedCorpus, model: Path, work: Work, processes: Processes) -> None:
    shape, vocabulary_size = read_description(model)
    if vocabulary_size != prepared.tokenizer.vocabulary_size:
        known = f"a vocabulary of {vocabulary_size}, the corpus {prepared.tokenizer.vocabulary_size}"
        raise UserError(model, f"has {known}", "give the synthesizer that was trained on this corpus")
    plan = SeedPlan.make(config, prepared.unique, shape.context)
    if not processes.tell((work.directory / INDEX).is_file()):  # with it, a killed attempt had only its parts left to remove
        if processes.leads:
            check_backend(config, processes.device)
        parts = Parts(work.directory, plan, prepared, shape.context)
        missing = processes.tell(parts.missing())
        if missing:
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


def _draw(plan: SeedPlan, parts: Parts, shards: list[int], drawers: Drawers, work: Work, processes: Processes) -> None:
    """Draw what is missing of this process's shards, each drawer in a thread of its own."""
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in drawers.facts.items())
    work.console.say(f"{processes.world} process(es), each with {facts}")
    seeds, total = _Shared(parts.seeds(shards)), sum(len(plan.shards[shard]) for shard in shards) * plan.samples
    whose = "documents drawn" if processes.world == 1 else "documents drawn by the first process"
    with work.console.task(whose, total, "documents", done=parts.drawn(shards)) as task:
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
