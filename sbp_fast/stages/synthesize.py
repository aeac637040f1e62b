"""The stage `synthesize`: new documents generated after seeds, each once, by any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sbp_fast.config import RunConfig, resolve_device
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.generate.seeds import wanted_tokens
from sbp_fast.generate.synthesis import check_names, corpus_counts, generate_corpus
from sbp_fast.pipeline.distributed import join_processes
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.launcher import world_size
from sbp_fast.pipeline.manifest import MANIFEST, Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage_together


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
    """Write a corpus of synthetic documents, enough for the arms and for what the filters will reject.

    Its document table has the columns of any corpus and: seed (index into the unique corpus), sample (number of the document
    among its seed's), stop (why it ended: "end", "length", "repetition"), mean_log_probability (nats a generated token, under
    the synthesizer at temperature 1).

    Processes started by torchrun share the work; workers that are not local do it in place of this process. The engine's
    documents depend neither on the number of processes nor on what an earlier attempt had generated.

    Args:
        config: of the run.
        out: directory of the output.
        corpus: output of `prepare`.
        model: directory of the synthesizer.
        console: for progress.
        force: replace an output that was made from other settings or inputs.
        workers: what generates in place of this process, unless local.

    Returns:
        The stage's manifest; None in all processes but the first.

    Raises:
        UserError: a backend or seed sampler that is not registered; a model that does not know the corpus's tokens; memory for
            less than one document; a backend that cannot run here; several processes and workers that are not local; what
            `run_stage` refuses.
    """
    check_names(config)
    if not workers.local and world_size() > 1:
        raise UserError("options", "several processes do not share a cluster", "leave out --gpus and torchrun, or --engine")
    inputs = {"corpus": corpus, "model": model}
    with join_processes(resolve_device(config) if workers.local else "cpu") as processes:

        def body(context: StageContext) -> None:
            prepared = PreparedCorpus(corpus)
            context.device = generate_corpus(
                config,
                prepared,
                model,
                context.directory,
                processes=processes,
                workers=workers,
                console=context.console,
                save_clock=context.save_clock,
            )
            if processes.is_rank0:
                counts, context.flops = corpus_counts(config, prepared, model, context.directory, context.device)
                context.record(**counts)

        return run_stage_together(
            processes,
            "synthesize",
            out,
            config=_settings_of_enough(synthesis_settings(config), out, inputs),
            inputs=inputs,
            body=body,
            console=console,
            force=force,
        )


def synthesis_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that the documents depend on; how many are generated together changes none."""
    return {
        "seed": config.seed,
        "synthesize": config.synthesize.settings(),
        "wanted_tokens": wanted_tokens(config),
    }


def _settings_of_enough(settings: dict[str, Any], out: Path, inputs: dict[str, Path]) -> dict[str, Any]:
    """Return the settings that a finished output was made with if it differs only by holding more tokens than are wanted."""
    if not (out / MANIFEST).is_file():
        return settings
    manifest = Manifest.read(out)
    enough = settings | {"wanted_tokens": max(settings["wanted_tokens"], manifest.config.get("wanted_tokens", 0))}
    fingerprints = {name: Manifest.read(path).fingerprint for name, path in inputs.items() if (path / MANIFEST).is_file()}
    return enough if manifest.config == enough and manifest.inputs == fingerprints else settings
