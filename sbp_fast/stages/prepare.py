"""The stage `prepare`: a tokenizer, globally shuffled token shards and a holdout split from raw documents."""

from __future__ import annotations

from pathlib import Path

from sbp_fast.config import RunConfig
from sbp_fast.data.documents import heldout_path, is_embedded, resolve_separator
from sbp_fast.data.encoder import import_gigatoken
from sbp_fast.data.input_files import fingerprint_sources
from sbp_fast.data.preparation import Preparation
from sbp_fast.data.round_trip import check_round_trips
from sbp_fast.data.tokenizer import Tokenizer
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.files import hash_file
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage


def prepare(config: RunConfig, out: Path, *, console: Console, force: bool = False, workers: Workers = LOCAL) -> Manifest:
    """Write `out`/train, `out`/heldout (each a `Corpus`) and `out`/tokenizer.json; open them with `PreparedCorpus`.

    With `corpus.on_error = "skip"`, also write `out`/skipped.jsonl, a line for each unusable record; with
    `corpus.deduplicate = "near"`, also write `out`/near-duplicates.parquet, a row for each document left out.

    Raises:
        UserError: the input is unusable (see `read_file`), there are too few documents, the encoder is not available (see
            `choose_encoder`), or `run_stage` refuses.
    """
    corpus = config.corpus
    if corpus.encoder == "gigatoken":
        import_gigatoken()  # a missing package is reported before the documents are read
    heldout = heldout_path(corpus)
    inputs = {"documents": fingerprint_sources(corpus.path)}
    if corpus.unique:
        inputs["unique"] = fingerprint_sources(corpus.unique)
    if heldout is not None:
        inputs["heldout"] = fingerprint_sources(heldout)
    if corpus.tokenizer != "train":
        check_round_trips(Tokenizer(corpus.tokenizer), (), lossy=corpus.lossy_tokenizer)
        inputs["tokenizer"] = hash_file(Path(corpus.tokenizer))
    settings = {
        "seed": config.seed,
        "embedded": is_embedded(corpus),
        "corpus": corpus.settings() | {"group_separator": resolve_separator(corpus)},
    }

    def body(context: StageContext) -> None:
        preparation = Preparation(
            config,
            context.directory,
            context.scratch,
            console=context.console,
            record=context.record,
            save_clock=context.save_clock,
            workers=workers,
        )
        preparation.run()

    return run_stage("prepare", out, config=settings, inputs=inputs, body=body, console=console, force=force)
