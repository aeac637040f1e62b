"""Scores of one model: every metric's numerator and denominator for each item, with the FLOPs of computing them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pyarrow as pa

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.likelihood import log_likelihoods
from sbp_fast.evaluate.metrics import Metric
from sbp_fast.model.flops import forward_flops
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.finite import require_finite_rows
from sbp_fast.pipeline.progress import Console


def score_model(
    model: Transformer, prepared: PreparedCorpus, metrics: Sequence[Metric], console: Console, name: str
) -> tuple[pa.Table, float]:
    """Return the score rows of all metrics (see `score_rows`) and the FLOPs of the forward passes.

    Raises:
        UserError: the model's vocabulary is not the corpus's, or it gives likelihoods that are not finite.
    """
    check_vocabulary(model, prepared, name)
    items = [metric.items(prepared, model.config.context) for metric in metrics]
    tables, flops = [], 0.0
    with console.task(f"scoring {name}", sum(len(tree) for group in items for tree in group.trees), "tokens") as task:
        for metric, group in zip(metrics, items, strict=True):
            nats, extent = log_likelihoods(model, group.trees, group.sequences, advance=task.advance)
            require_finite_rows(nats, "log-likelihood", partial("model {}, {}, sequence {}".format, name, metric.name))
            tables.append(group.to_rows(nats))
            flops += forward_flops(model.config, model.vocabulary_size, extent.tokens, extent.visible_pairs, extent.predictions)
    return pa.concat_tables(tables), flops


def check_vocabulary(model: Transformer, prepared: PreparedCorpus, name: str) -> None:
    """Raise a UserError unless the model's vocabulary has the size of the corpus's; `name` is the model's in the message."""
    if model.vocabulary_size != prepared.tokenizer.vocabulary_size:
        raise UserError(
            f"model of {name}",
            f"has a vocabulary of {model.vocabulary_size}, the corpus one of {prepared.tokenizer.vocabulary_size}",
            "evaluate models with the corpus that they were trained on",
        )
