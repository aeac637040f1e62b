"""The stage `embed`: one unit vector for each unique and held-out document, from a sentence-embedding model or from a file."""

from __future__ import annotations

from pathlib import Path

from sbp_fast.config import RunConfig
from sbp_fast.config.embed import OF_FILE
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.neighbors.embedding import embed_documents
from sbp_fast.neighbors.endpoint_encoder import check_endpoint
from sbp_fast.neighbors.imported import import_vectors
from sbp_fast.neighbors.vector_files import fingerprint_vectors
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage


def embed(
    config: RunConfig, corpus: Path, out: Path, *, console: Console, force: bool = False, workers: Workers = LOCAL
) -> Manifest:
    """Embed the unique and the held-out documents of a prepared corpus.

    Writes, for each `embed.shard_documents` documents, `vectors-00000.npy` ([documents, dimension] as `embed.storage`, to be
    read by `Vectors`) and `lengths-00000.npy` (int64 [documents], tokens of the encoder before truncation, or characters with
    `embed.endpoint`), in corpus order; those of the held-out documents, which `pair` finds held-out pairs by, in the folder
    `heldout`.

    With `embed.file`, the vectors are those of files, and there are no lengths.

    Raises:
        UserError: the model is neither installed nor reachable, or its vectors are shorter than `embed.dimensions`; what
            `import_vectors` refuses.
    """
    if config.embed.file:
        return _import(config, corpus, out, console=console, force=force)
    check_endpoint(config.embed)  # before anything is written

    def body(context: StageContext) -> None:
        result = embed_documents(
            config, corpus, context.directory, workers=workers, console=console, checkpoint=context.save_clock
        )
        context.device, context.flops = result.device, result.flops
        context.record(**result.counts)

    return run_stage(
        "embed",
        out,
        config={"embed": config.embed.settings()},
        inputs={"corpus": corpus},
        body=body,
        console=console,
        force=force,
    )


def _import(config: RunConfig, corpus: Path, out: Path, *, console: Console, force: bool) -> Manifest:
    settings = config.embed

    def body(context: StageContext) -> None:
        counts = import_vectors(
            settings,
            PreparedCorpus(corpus),
            context.directory,
            context.scratch,
            console=console,
            checkpoint=context.save_clock,
        )
        context.record(**counts)

    return run_stage(
        "embed",
        out,
        config={"embed": {"model": OF_FILE} | settings.model_dump(include={"dimensions", "storage", "shard_documents"})},
        inputs={"corpus": corpus, "vectors": fingerprint_vectors(settings.file)},
        body=body,
        console=console,
        force=force,
    )
