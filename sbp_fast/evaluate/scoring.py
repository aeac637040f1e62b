"""Scores of one model: every metric's numerator and denominator for each item, with the FLOPs of computing them."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.metrics import Metric
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.progress import Console


def score_model(
    model: Transformer, prepared: PreparedCorpus, metrics: Sequence[Metric], console: Console, name: str
) -> tuple[pa.Table, float]:
    """Return the score rows of all metrics (see `score_rows`) and the FLOPs that computing them took.

    Raises:
        UserError: the model's vocabulary is not the corpus's, or it gives likelihoods that are not finite.
    """
    check_vocabulary(model, prepared, name)
    shared = dict.fromkeys(metric.items for metric in metrics)  # each once, though several metrics may ask for it
    groups = [items(prepared, model.config.context) for items in shared]
    with console.task(f"scoring {name}", sum(group.tokens for group in groups), "tokens") as task:
        tables, flops = zip(*(group.score(model, name, task.advance) for group in groups), strict=True)
    return pa.concat_tables(tables), sum(flops)


def check_vocabulary(model: Transformer, prepared: PreparedCorpus, name: str) -> None:
    """Raise a UserError unless the model's vocabulary has the size of the corpus's; `name` is the model's in the message."""
    if model.vocabulary_size != prepared.tokenizer.vocabulary_size:
        raise UserError(
            f"model of {name}",
            f"has a vocabulary of {model.vocabulary_size}, the corpus one of {prepared.tokenizer.vocabulary_size}",
            "evaluate models with the corpus that they were trained on",
        )
