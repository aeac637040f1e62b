"""The stage `filter`: the synthetic documents that pass the filter rules, and the reject reason of each other one."""

from __future__ import annotations

from pathlib import Path

from sbp_fast.config import RunConfig, resolve_threads
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.evaluate.question_sets import all_question_sets
from sbp_fast.filters.filtering import filter_corpus
from sbp_fast.filters.rules import thresholds
from sbp_fast.generate.saved import open_synthetic
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage


def filter_documents(
    config: RunConfig,
    out: Path,
    *,
    corpus: Path,
    synthetic: Path,
    console: Console,
    force: bool = False,
    workers: Workers = LOCAL,
) -> Manifest:
    """Write the filtered documents of `synthetic` as a corpus of the same columns, and the others to `rejected.parquet`.

    A row of `rejected.parquet` has the document's id, seed, sample and tokens, the `reason` (the first rule that rejects it)
    and the `value` that the rule compared with its threshold.

    Args:
        config: of the run.
        out: directory of the output.
        corpus: output of `prepare`.
        synthetic: output of `synthesize` on it.
        console: for progress.
        force: replace an output that was made from other settings or inputs.
        workers: what runs the tasks.

    Raises:
        UserError: inputs that do not belong together; no document passes.
    """
    prepared = PreparedCorpus(corpus)
    sets = all_question_sets(config.evaluate, config.seed, prepared, Console(quiet=True))

    def body(context: StageContext) -> None:
        written = open_synthetic(synthetic, prepared)
        counts = filter_corpus(
            config.filter,
            prepared,
            written,
            {questions.name: questions.texts for questions in sets},
            context.directory,
            context.scratch,
            threads=resolve_threads(config),
            workers=workers,
            console=context.console,
            save_clock=context.save_clock,
        )
        context.record(**counts)

    return run_stage(
        "filter",
        out,
        config={"filter": config.filter.settings(), "rules": thresholds(config.filter)},
        inputs={
            "corpus": corpus,
            "synthetic": synthetic,
            **{f"questions of {questions.name}": questions.fingerprint for questions in sets},
        },
        body=body,
        console=console,
        force=force,
    )
