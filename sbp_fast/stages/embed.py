"""The stage `embed`: one unit vector for each unique and each held-out document, from a sentence-embedding model."""

from __future__ import annotations

from pathlib import Path

from sbp_fast.config import RunConfig
from sbp_fast.neighbors.embedding import embed_documents
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
    read by `Vectors`) and `lengths-00000.npy` (int64 [documents], tokens of the encoder before truncation), in corpus order;
    those of the held-out documents, which `pair` finds held-out pairs by, in the folder `heldout`.

    Raises:
        UserError: the model is neither installed nor reachable, or its vectors are shorter than `embed.dimensions`.
    """

    def body(context: StageContext) -> None:
        result = embed_documents(
            config, corpus, context.directory, workers=workers, console=console, checkpoint=context.save_clock
        )
        context.device, context.flops = result.device, result.flops
        context.record(**result.counts)

    return run_stage(
        "embed",
        out,
        config={"embed": config.embed.model_dump(mode="json")},
        inputs={"corpus": corpus},
        body=body,
        console=console,
        force=force,
    )
