"""Filtering of a whole synthetic corpus: features, rules and near-duplicates, then the filtered and the rejected documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.config import FilterConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.errors import UserError
from sbp_fast.filters.near_duplicates import find_duplicates
from sbp_fast.filters.rules import DUPLICATE, document_rules, rule_counts
from sbp_fast.filters.tasks import (
    QUESTIONS,
    FilterTask,
    compute_features,
    count_shingles,
    judge_shard,
    load_overlaps,
    load_reasons,
)
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.files import atomic_path, write_json
from sbp_fast.pipeline.progress import Console

Duplicates: TypeAlias = tuple[np.ndarray, np.ndarray]
"""As `find_duplicates` returns them."""
HELDOUT = "held-out documents alone"
REJECTED = "rejected.parquet"
REJECTED_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "seed": pa.int64(),
        "sample": pa.int64(),
        "tokens": pa.int64(),
        "reason": pa.string(),
        "value": pa.float64(),
    }
)


def filter_corpus(
    config: FilterConfig,
    prepared: PreparedCorpus,
    synthetic: Corpus,
    questions: Mapping[str, Sequence[str]],
    directory: Path,
    scratch: Path,
    *,
    threads: int,
    workers: Workers,
    console: Console,
    save_clock: Callable[[], None],
) -> dict[str, Any]:
    """Write the filtered documents of `synthetic` as a corpus of the same columns, and the others to `rejected.parquet`.

    Args:
        config: thresholds.
        prepared: the corpus that the seeds are in.
        synthetic: the documents to filter.
        questions: task -> its evaluation questions with their answers.
        directory: to write into.
        scratch: for the files of finished steps; what an earlier attempt left there is not done again.
        threads: processes or threads of this machine at a time.
        workers: what runs the tasks.
        console: for progress and the result.
        save_clock: called after each durable step.

    Returns:
        The counts for the manifest.

    Raises:
        UserError: no document passes.
    """
    corpus, generated, rules = prepared.directory, Path(synthetic.directory), document_rules()
    shards, made_from = range(len(synthetic.shard_starts) - 1), f"{prepared.fingerprint} {synthetic.fingerprint}"
    tasks = [FilterTask(corpus, generated, made_from, scratch, number, config, rules) for number in shards]
    _judge(tasks, prepared, synthetic, questions, threads, workers, console, save_clock)
    keys = [task.file("keys") for task in tasks]
    duplicates = find_duplicates(synthetic, keys, config.shingle_tokens, config.duplicate_similarity)
    rejected = _count_reasons(tasks, synthetic, duplicates)
    if rejected.total() == len(synthetic):
        counted = ", ".join(f"{number} {reason}" for reason, number in sorted(rejected.items()))
        remedy = "tune the synthesizer for longer, or loosen the settings under filter."
        raise UserError(synthetic.directory, f"no document passes the filters: {counted}", remedy)
    tokens = _write(tasks, synthetic, duplicates, directory)
    passed = len(synthetic) - rejected.total()
    console.say(f"kept {passed} of {len(synthetic)} documents; rejected: {dict(sorted(rejected.items())) or 'none'}")
    return {
        "documents": len(synthetic),
        "filtered_documents": passed,
        "filtered_tokens": tokens,
        "rules": rule_counts(rejected, len(synthetic), config),
        "contamination": _count_contamination(tasks, prepared, questions),
    }


def _judge(
    tasks: list[FilterTask],
    prepared: PreparedCorpus,
    synthetic: Corpus,
    questions: Mapping[str, Sequence[str]],
    threads: int,
    workers: Workers,
    console: Console,
    save_clock: Callable[[], None],
) -> None:
    """Judge each document by itself, shard by shard."""
    write_json(tasks[0].directory / QUESTIONS, questions)
    shard_documents = np.diff(synthetic.shard_starts).tolist()
    with console.task("documents judged", 3 * len(synthetic), "steps") as progress:

        def run(step: Callable[[FilterTask], None]) -> None:
            for documents, _ in zip(shard_documents, workers.run(step, tasks, threads), strict=True):
                progress.advance(documents)
                save_clock()

        run(compute_features)
        texts = [text for of_task in questions.values() for text in of_task]
        count_shingles(tasks, prepared, texts, threads, progress.advance)
        save_clock()
        run(judge_shard)


def _count_reasons(tasks: list[FilterTask], synthetic: Corpus, duplicates: Duplicates) -> Counter[str]:
    """Count the rejected documents by reason."""
    rejected = Counter[str]()
    for task in tasks:
        reasons, _ = _reject_reasons(task, synthetic, duplicates)
        rejected.update(reasons[reasons != ""].tolist())
    return rejected


def _count_contamination(
    tasks: list[FilterTask], prepared: PreparedCorpus, questions: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, int]]:
    """Return the number of texts of each question task, and of the contaminated documents that share a shingle with them.

    A document that overlaps with several tasks is counted for each of them. One that overlaps with no question owes its
    rejection to held-out documents, which are the last entry.
    """
    overlaps = np.concatenate([load_overlaps(task) for task in tasks])
    rejected = overlaps.sum(0).tolist()
    counts = {name: {"texts": len(texts), "rejected": rejected[i]} for i, (name, texts) in enumerate(questions.items())}
    return counts | {HELDOUT: {"texts": len(prepared.heldout), "rejected": int((~overlaps.any(1)).sum())}}


def _reject_reasons(task: FilterTask, synthetic: Corpus, duplicates: Duplicates) -> tuple[np.ndarray, np.ndarray]:
    """Return the reject reason of each document of a shard, "" for a filtered one, and the value that the rule compared."""
    reasons, values = load_reasons(task)
    documents, similarities = duplicates
    first, last = synthetic.shard_starts[task.number : task.number + 2]
    in_shard = slice(*np.searchsorted(documents, [first, last]))
    reasons[documents[in_shard] - first], values[documents[in_shard] - first] = DUPLICATE, similarities[in_shard]
    return reasons, values


def _write(tasks: list[FilterTask], synthetic: Corpus, duplicates: Duplicates, directory: Path) -> int:
    """Write the filtered documents and the table of the rejected ones; return the tokens of the filtered ones."""
    writer = CorpusWriter(directory, synthetic.vocabulary_size)
    with atomic_path(directory / REJECTED) as temporary, pq.ParquetWriter(temporary, REJECTED_SCHEMA) as rejected_file:
        for task in tasks:
            table, tokens = synthetic.shard(task.number)
            reasons, values = _reject_reasons(task, synthetic, duplicates)
            _write_filtered(table, tokens, reasons == "", writer)
            rejected = np.flatnonzero(reasons != "")
            rows = table.take(rejected).select(["id", "seed", "sample", "tokens"])
            rows = rows.append_column("reason", pa.array(reasons[rejected].tolist(), pa.string()))
            rejected_file.write_table(rows.append_column("value", pa.array(values[rejected])).cast(REJECTED_SCHEMA))
    return writer.close().tokens


def _write_filtered(table: pa.Table, tokens: np.ndarray, passes: np.ndarray, writer: CorpusWriter) -> None:
    """Add the documents of a shard that pass, with all their columns."""
    columns = {name: table[name].filter(passes) for name in table.column_names}
    lengths = columns.pop("tokens").to_numpy()
    tokens = tokens[np.repeat(passes, table["tokens"].to_numpy())]
    ids, sources = columns.pop("id"), columns.pop("source")
    writer.add_batch(tokens, lengths, ids=ids, sources=sources, **columns)
