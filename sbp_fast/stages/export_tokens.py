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
    """Write a token corpus in the format of another project.

    Megatron: `tokens.bin` and `tokens.idx`, where each document is one sequence. MDS: `index.json` and its shards with the
    columns id, source and tokens. Parquet: a file for each shard, its document table with the ids in a column `tokens`.

    Raises:
        UserError: there is no corpus, or it is damaged; the format is unknown or cannot hold a document; `run_stage` refuses.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}", "no such format", f"choose from {', '.join(FORMATS)}")
    opened = Corpus(corpus)

    def body(context: StageContext) -> None:
        FORMATS[to](opened, context.directory)
        context.record(documents=len(opened), tokens=opened.tokens)

    inputs = {"corpus": opened.fingerprint}
    return run_stage("export-tokens", out, config={"to": to}, inputs=inputs, body=body, console=console, force=force)
