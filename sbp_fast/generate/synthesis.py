"""The synthetic corpus of a run: generated shard by shard by any number of processes, then counted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import INDEX, Corpus
from sbp_fast.errors import UserError
from sbp_fast.generate.backends import BACKENDS
from sbp_fast.generate.seeds import NO_SEED, SEED_SAMPLERS, SeedPlan
from sbp_fast.generate.shard_writer import PARTS, ShardWriter
from sbp_fast.generate.tasks import generate_locally, generate_remotely, read_versions
from sbp_fast.model.flops import forward_flops
from sbp_fast.model.saved import read_description
from sbp_fast.pipeline.distributed import Processes
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.progress import Console


def check_names(config: RunConfig) -> None:
    """Check that the backend and the seed sampler of the configuration are registered.

    Raises:
        UserError: one is not; the message lists those that are.
    """
    BACKENDS[config.synthesize.backend]
    SEED_SAMPLERS[config.synthesize.seeds]


def generate_corpus(
    config: RunConfig,
    prepared: PreparedCorpus,
    model: Path,
    directory: Path,
    *,
    processes: Processes,
    workers: Workers,
    console: Console,
    save_clock: Callable[[], None],
) -> str:
    """Write the synthetic corpus, doing only what is not done yet; all processes call this together.

    Args:
        config: of the run.
        prepared: the corpus that the seeds are in.
        model: directory of the synthesizer.
        directory: of the synthetic corpus.
        processes: this process among those that share the work.
        workers: what generates in place of this process, unless local.
        console: for progress.
        save_clock: called after each durable step, and every few seconds.

    Returns:
        The device that generated.

    Raises:
        UserError: a model that does not know the corpus's tokens; a backend that cannot run here.
    """
    shape, vocabulary_size = read_description(model)
    if vocabulary_size != prepared.tokenizer.vocabulary_size:
        problem = f"has a vocabulary of {vocabulary_size}, the corpus {prepared.tokenizer.vocabulary_size}"
        raise UserError(model, problem, "give the synthesizer that was trained on this corpus")
    device = str(processes.device)
    plan = SeedPlan.make(config, prepared.unique, shape.context)
    # with an index, a killed attempt only had to remove its journals
    if not processes.broadcast(processes.is_rank0 and _is_written(directory)):
        if workers.local:
            BACKENDS[config.synthesize.backend].check(config.synthesize, processes.device)  # every process refuses
        writer = ShardWriter(directory, plan, prepared, shape.context)
        missing = processes.broadcast(writer.missing())
        if missing and workers.local:
            generate_locally(config, writer, missing, model, processes=processes, console=console, save_clock=save_clock)
        elif missing:
            device = generate_remotely(config, writer, missing, model, workers=workers, console=console, save_clock=save_clock)
        processes.gather(None)
        if processes.is_rank0:
            writer.write_index()
    if processes.is_rank0:
        shutil.rmtree(directory / PARTS, ignore_errors=True)
    return device


def _is_written(directory: Path) -> bool:
    """Return whether an earlier attempt wrote the whole corpus, and its files are as they were written."""
    if not (directory / INDEX).is_file():
        return False
    try:
        Corpus(directory).verify()
    except UserError as error:
        Console().say(f"{error.where}: {error.what}, and so made again")
        return False
    return True


def corpus_counts(
    config: RunConfig, prepared: PreparedCorpus, model: Path, directory: Path, device: str
) -> tuple[dict[str, Any], float]:
    """Return the counts of a synthetic corpus for the manifest, and the FLOPs that generating it took.

    Args:
        config: of the run.
        prepared: the corpus that the seeds are in.
        model: directory of the synthesizer.
        directory: of the synthetic corpus.
        device: the device that generated.
    """
    shape, vocabulary_size = read_description(model)
    plan = SeedPlan.make(config, prepared.unique, shape.context)
    synthetic = Corpus(directory)
    stops, lengths = synthetic.column("stop"), np.diff(synthetic.offsets) - 2
    generated = lengths + (stops == "end")
    log_probabilities = synthetic.column("mean_log_probability")
    settings = config.synthesize
    counts = {
        "documents": len(synthetic),
        "tokens": synthetic.tokens,
        "seeds": int((plan.documents != NO_SEED).sum()),
        "samples_per_seed": plan.samples,
        "stops": {str(name): int(number) for name, number in zip(*np.unique(stops, return_counts=True), strict=True)},
        "finished_share": float((stops == "end").mean()),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "backend": settings.backend,
        "backend_versions": read_versions(directory),
        "reproducible": BACKENDS[settings.backend].reproducible_on_cpu and device == "cpu",
        "mean_tokens": float(lengths.mean()),
        "mean_log_probability": float((log_probabilities * generated).sum() / generated.sum()),
    }
    prefilled = np.minimum(np.diff(prepared.unique.offsets), shape.context)[plan.documents]
    prefilled[plan.documents == NO_SEED] = 0
    pairs = (prefilled * (prefilled + 1) // 2).sum() + (generated * np.repeat(prefilled, plan.samples)).sum()
    pairs += (generated * (generated + 1) // 2).sum()
    tokens = prefilled.sum() + generated.sum()
    return counts, forward_flops(shape, vocabulary_size, float(tokens), float(pairs), float(generated.sum()))
