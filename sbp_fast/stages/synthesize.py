"""The stage `synthesize`: new documents drawn after seeds, each once, by any number of processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import RunConfig, resolve_device
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import INDEX, Corpus
from sbp_fast.errors import UserError
from sbp_fast.generate.backends.backend import check_backend
from sbp_fast.generate.seeds import SeedPlan, wanted_tokens
from sbp_fast.generate.shard_writer import PARTS, Parts
from sbp_fast.generate.tasks import draw_elsewhere, draw_here, versions_in
from sbp_fast.model.flops import forward_flops
from sbp_fast.model.saved import read_description
from sbp_fast.pipeline.distributed import Processes, join_processes, world_size
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import Manifest, Work, run_stage_together


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
    with join_processes(resolve_device(config) if workers.local else "cpu") as processes:

        def body(work: Work) -> None:
            work.device = str(processes.device)
            _synthesize(config, PreparedCorpus(corpus), model, work, processes, workers)

        return run_stage_together(
            processes,
            "synthesize",
            out,
            config=what_it_depends_on(config),
            inputs={"corpus": corpus, "model": model},
            body=body,
            console=console,
            force=force,
        )


def what_it_depends_on(config: RunConfig) -> dict[str, Any]:
    """The settings that the documents depend on; how many are drawn together changes none."""
    return {
        "seed": config.seed,
        "synthesize": config.synthesize.settings(),
        "wanted_tokens": wanted_tokens(config),
    }


def _synthesize(
    config: RunConfig, prepared: PreparedCorpus, model: Path, work: Work, processes: Processes, workers: Workers
) -> None:
    shape, vocabulary_size = read_description(model)
    if vocabulary_size != prepared.tokenizer.vocabulary_size:
        known = f"a vocabulary of {vocabulary_size}, the corpus {prepared.tokenizer.vocabulary_size}"
        raise UserError(model, f"has {known}", "give the synthesizer that was trained on this corpus")
    plan = SeedPlan.make(config, prepared.unique, shape.context)
    # with the index, a killed attempt had only its parts left to remove
    if not processes.broadcast((work.directory / INDEX).is_file()):
        if workers.local:
            check_backend(config, processes.device)  # in every process, so that all of them refuse
        parts = Parts(work.directory, plan, prepared, shape.context)
        missing = processes.broadcast(parts.missing())
        if missing and workers.local:
            draw_here(config, parts, missing, model, work, processes)
        elif missing:
            draw_elsewhere(config, parts, missing, model, work, workers)
        processes.gather(None)
        if processes.is_rank0:
            parts.join()
    if processes.is_rank0:
        shutil.rmtree(work.directory / PARTS, ignore_errors=True)
        _record(config, plan, prepared, model, work)


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
        backend_versions=versions_in(work.directory),
        reproducible=settings.backend == "engine" and work.device == "cpu",
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
