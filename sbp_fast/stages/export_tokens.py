"""The stage `export-tokens`: a token corpus in the format of another project."""

from __future__ import annotations

from pathlib import Path

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.export import FORMATS
from sbp_fast.errors import UserError
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage


def export_tokens(corpus: str | Path, to: str, out: Path, *, console: Console, force: bool = False) -> Manifest:
    """Write a token corpus so that another project reads it.

    Megatron: `tokens.bin` and `tokens.idx`, a sequence and a document each. MDS: `index.json` and its shards with the columns
    id, source and tokens. Parquet: a file for each shard with the columns of its table, `tokens` the ids themselves.

    Raises:
        UserError: no corpus, or a damaged one; an unknown format; a document that the format cannot hold; what `run_stage`
            refuses.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}", "no such format", f"choose from {', '.join(FORMATS)}")
    opened = Corpus(corpus)

    def body(context: StageContext) -> None:
        FORMATS[to](opened, context.directory)
        context.record(documents=len(opened), tokens=opened.tokens)

    inputs = {"corpus": opened.fingerprint}
    return run_stage("export-tokens", out, config={"to": to}, inputs=inputs, body=body, console=console, force=force)
