"""The stage "evaluate": every arm on the held-out text and the multiple-choice questions, with bootstrap intervals.

Every metric is a ratio of two sums over its items: bits over bytes for documents, right answers over questions. So one
table of (numerator, denominator) an item holds all that an arm was measured at, and one bootstrap serves every metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sbp_fast.config import RunConfig, resolve_device, resolve_threads
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.bootstrap import interval, ratio, resample_sums
from sbp_fast.evaluate.likelihood import Extent, Tree, choice_trees, document_trees, log_likelihoods
from sbp_fast.evaluate.multiple_choice import QuestionSet, question_sets
from sbp_fast.model.flops import forward_flops
from sbp_fast.model.saved import load_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.files import atomic_path
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import Manifest, Work, run_stage

BITS_PER_BYTE = "heldout_bits_per_byte"
FLOPS = b"flops"


def evaluate(
    config: RunConfig, out: Path, *, corpus: Path, models: dict[str, Path], console: Console, force: bool = False
) -> Manifest:
    """Measure `models`, by the name of their arm; differences are against the first.

    Writes `scores-ARM.parquet`, one row for each held-out document and each question; a killed run goes on with the next arm.

    Raises:
        UserError: an input that is not finished, a model of another vocabulary, a malformed question file.
    """
    prepared = PreparedCorpus(corpus)
    sets = question_sets(config.evaluate, config.seed, prepared, console)
    return run_stage(
        "evaluate",
        out,
        config={
            "evaluate": config.evaluate.settings(),
            "seed": config.seed,
            "arms": list(models),
        },
        inputs={"corpus": corpus, **models, **{f"questions of {one.metric}": one.fingerprint for one in sets}},
        body=lambda work: _evaluate(config, work, prepared, sets, models),
        console=console,
        force=force,
    )


def _evaluate(
    config: RunConfig, work: Work, prepared: PreparedCorpus, sets: list[QuestionSet], models: dict[str, Path]
) -> None:
    torch.set_num_threads(resolve_threads(config))
    work.device = resolve_device(config)
    tables = {}
    for arm, directory in models.items():
        path = work.directory / f"scores-{arm}.parquet"
        if not path.is_file():
            table = score(load_model(directory, work.device), prepared, sets, work.console, arm)
            with atomic_path(path) as temporary:
                pq.write_table(table, temporary)
            work.keep_clock()
        tables[arm] = pq.read_table(path)
        work.flops += float(tables[arm].schema.metadata[FLOPS])
    work.record(**summarize(tables, sets, config))


def score(model: Transformer, prepared: PreparedCorpus, sets: Sequence[QuestionSet], console: Console, arm: str) -> pa.Table:
    """One row an item: metric, id, source, numerator, denominator, and for questions each choice's score.

    A choice's score is its log-probability after the prompt divided by its UTF-8 bytes (the joining space included), so that
    long choices are not at a disadvantage. Bits per byte counts each document's end token among its bits.
    """
    if model.vocabulary_size != prepared.tokenizer.vocabulary_size:
        raise UserError(
            f"model of {arm}",
            f"has a vocabulary of {model.vocabulary_size}, the corpus one of {prepared.tokenizer.vocabulary_size}",
            "evaluate models with the corpus that they were trained on",
        )
    context, heldout = model.config.context, prepared.heldout
    documents = document_trees([heldout[index] for index in range(len(heldout))], context)
    questions = [_question_trees(prepared, one, context) for one in sets]
    tokens = sum(len(tree) for trees in (documents, *questions) for tree in trees)
    with console.task(f"scoring {arm}", tokens, "tokens") as task:
        nats, extent = log_likelihoods(model, documents, len(heldout), advance=task.advance)
        extents, tables = [extent], [_document_rows(prepared, nats)]
        for one, trees in zip(sets, questions, strict=True):
            choices = sum(len(question.choices) for question in one.questions)
            nats, extent = log_likelihoods(model, trees, choices, advance=task.advance)
            extents.append(extent)
            tables.append(_question_rows(one, nats))
    flops = sum(_flops(model, extent) for extent in extents)
    return pa.concat_tables(tables).replace_schema_metadata({FLOPS: repr(flops)})


def _flops(model: Transformer, extent: Extent) -> float:
    return forward_flops(model.config, model.vocabulary_size, extent.tokens, extent.visible_pairs, extent.predictions)


def _question_trees(prepared: PreparedCorpus, one: QuestionSet, context: int) -> list[Tree]:
    tokenizer = prepared.tokenizer
    prompts = tokenizer.encode_batch([question.prompt for question in one.questions])
    choices = iter(tokenizer.encode_batch([_joined(choice) for question in one.questions for choice in question.choices]))
    return choice_trees(
        [
            ([tokenizer.begin, *prompt], [next(choices) for _ in question.choices])
            for question, prompt in zip(one.questions, prompts, strict=True)
        ],
        context,
        where=one.metric,
    )


def _joined(choice: str) -> str:
    """A choice as it stands after its prompt."""
    return f" {choice.strip()}"


def _document_rows(prepared: PreparedCorpus, nats: np.ndarray) -> pa.Table:
    heldout = prepared.heldout
    return _rows(BITS_PER_BYTE, heldout.ids, heldout.sources, -nats / math.log(2), heldout.text_bytes, [None] * len(heldout))


def _question_rows(one: QuestionSet, nats: np.ndarray) -> pa.Table:
    questions, scores, start = one.questions, [], 0
    for question in questions:
        end = start + len(question.choices)
        scores.append(nats[start:end] / [len(_joined(choice).encode()) for choice in question.choices])
        start = end
    right = [int(np.argmax(score)) == question.answer for score, question in zip(scores, questions, strict=True)]
    ids, sources = [question.id for question in questions], [question.source for question in questions]
    return _rows(one.metric, ids, sources, right, np.ones(len(questions)), scores)


def _rows(metric: str, ids: Any, sources: Any, numerator: Any, denominator: Any, scores: Any) -> pa.Table:
    return pa.table(
        {
            "metric": pa.array([metric] * len(ids), pa.string()),
            "id": pa.array(ids, pa.string()),
            "source": pa.array(sources, pa.string()),
            "numerator": pa.array(np.asarray(numerator, np.float64)),
            "denominator": pa.array(np.asarray(denominator, np.float64)),
            "scores": pa.array(scores, pa.list_(pa.float64())),
        }
    )


def summarize(tables: dict[str, pa.Table], sets: Sequence[QuestionSet], config: RunConfig) -> dict[str, Any]:
    """The manifest's counts: each arm's metrics, differences to the first arm, and the share of the oracle's gain."""
    arms: dict[str, dict[str, Any]] = {arm: {} for arm in tables}
    baseline, *others = tables
    differences: dict[str, dict[str, Any]] = {arm: {} for arm in others}
    recovered: dict[str, Any] = {}
    extras: dict[str, dict[str, float]] = {BITS_PER_BYTE: {}} | {one.metric: {"chance": one.chance} for one in sets}
    for metric, extra in extras.items():
        items = {arm: _of_metric(table, metric) for arm, table in tables.items()}
        values, draws = _bootstrap(list(items.values()), config)
        for column, (arm, item) in enumerate(items.items()):
            size = {"documents" if metric == BITS_PER_BYTE else "questions": item.num_rows}
            arms[arm][metric] = interval(values[column], draws[:, column], config.evaluate.confidence) | size | extra
            arms[arm][metric]["by_source"] = _by_source(item, config)
            if arm != baseline:
                change, change_draws = values[column] - values[0], draws[:, column] - draws[:, 0]
                differences[arm][metric] = interval(change, change_draws, config.evaluate.confidence)
        if "sbp" in others and "oracle" in others:
            three = [0, list(items).index("sbp"), list(items).index("oracle")]
            sign = -1 if metric == BITS_PER_BYTE else 1
            recovered[metric] = recovered_share(sign * values[three], sign * draws[:, three], config.evaluate.confidence)
    return {
        "arms": arms,
        "differences": differences,
        "recovered_share_of_oracle": recovered,
        "confidence": config.evaluate.confidence,
        "bootstrap_samples": config.evaluate.bootstrap_samples,
    }


def recovered_share(values: np.ndarray, draws: np.ndarray, confidence: float) -> dict[str, Any]:
    """SBP's gain over the baseline as a share of the oracle's, or null where the oracle has not clearly gained.

    Args:
        values: [3], baseline, SBP, oracle, more being better; draws: [samples, 3], their bootstrap.
    """
    gain = interval(values[2] - values[0], draws[:, 2] - draws[:, 0], confidence)
    if gain["high"] < 0:
        return {"value": None, "reason": "the oracle itself did worse than the baseline"}
    if gain["low"] <= 0:
        return {"value": None, "reason": "the oracle's own gain is not distinguishable from zero"}
    share = (draws[:, 1] - draws[:, 0]) / (draws[:, 2] - draws[:, 0])
    return interval((values[1] - values[0]) / (values[2] - values[0]), share, confidence)


def _of_metric(table: pa.Table, metric: str) -> pa.Table:
    return table.filter(np.array(table["metric"].to_pylist()) == metric)


def _bootstrap(items: list[pa.Table], config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of every arm [arms], and of its resamples [samples, arms]; all arms share the resamples."""
    columns = np.stack([item[name].to_numpy() for name in ("numerator", "denominator") for item in items], axis=1)
    sums = resample_sums(columns, config.evaluate.bootstrap_samples, config.seed)
    return ratio(columns.sum(0)), ratio(sums)


def _by_source(item: pa.Table, config: RunConfig) -> dict[str, Any]:
    sources = np.array(item["source"].to_pylist())
    found = {}
    for source in sorted(set(sources.tolist())):
        part = item.filter(sources == source)
        values, draws = _bootstrap([part], config)
        found[source] = interval(values[0], draws[:, 0], config.evaluate.confidence) | {"items": part.num_rows}
    return found
