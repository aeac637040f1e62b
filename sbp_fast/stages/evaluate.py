"""The stage `evaluate`: one model's scores by every metric, for each held-out document and each question."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import torch

from sbp_fast.config import RunConfig, resolve_device, resolve_threads
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.evaluate.metrics import all_metrics
from sbp_fast.evaluate.scoring import score_model
from sbp_fast.model.saved import load_model
from sbp_fast.pipeline.files import atomic_path
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage

SCORES = "scores.parquet"


def evaluate(
    config: RunConfig, out: Path, *, corpus: Path, model: Path, console: Console, force: bool = False, name: str = ""
) -> Manifest:
    """Score a model; writes `scores.parquet`, one row for each item of each metric.

    Args:
        config: of the run.
        out: directory of the output.
        corpus: output of `prepare`.
        model: directory of a trained model.
        console: for progress.
        force: replace an output that was made from other settings or inputs.
        name: name of the model in messages, by default the name of its directory.

    Raises:
        UserError: an input is not finished, the model has another vocabulary, or a question file is malformed.
    """
    prepared = PreparedCorpus(corpus)
    metrics = all_metrics(config, prepared, console)

    def body(context: StageContext) -> None:
        torch.set_num_threads(resolve_threads(config))
        context.device = resolve_device(config)
        trained = load_model(model, context.device)
        table, context.flops = score_model(trained, prepared, metrics, context.console, name or model.name)
        with atomic_path(context.directory / SCORES) as temporary:
            pq.write_table(table, temporary)
        context.record(metrics={metric.name: metric.describe() for metric in metrics})

    return run_stage(
        "evaluate",
        out,
        config={
            "evaluate": config.evaluate.settings(),
            "seed": config.seed,
            "metrics": [metric.name for metric in metrics],
        },
        inputs={
            "corpus": corpus,
            "model": model,
            **{f"items of {metric.name}": metric.fingerprint for metric in metrics if metric.fingerprint},
        },
        body=body,
        console=console,
        force=force,
    )
