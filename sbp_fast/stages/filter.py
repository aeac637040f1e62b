"""The stage `filter`: sound synthetic documents are kept, and of each other one the reason is recorded."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.config import RunConfig, resolve_threads
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.errors import UserError
from sbp_fast.evaluate.multiple_choice import QuestionSet, question_sets
from sbp_fast.filters.contamination import question_texts
from sbp_fast.filters.near_duplicates import find_duplicates
from sbp_fast.filters.rules import DUPLICATE, rule_counts
from sbp_fast.filters.tasks import QUESTIONS, Shard, count_known, judge_shard, judged, measure_shard
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.files import atomic_path, read_json, write_json
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import MANIFEST, Manifest, Work, run_stage

Duplicates: TypeAlias = tuple[np.ndarray, np.ndarray]
"""As `find_duplicates` returns them."""
REJECTED, MEASURES = "rejected.parquet", "measures"
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
    """Write the kept documents of `synthetic` as a corpus of the same columns, and `rejected.parquet` with the others.

    A row of the others has the document's id, seed, sample and tokens, the `reason` (the first of the rules that took it) and
    the `value` that this rule measured.

    Args:
        corpus: output of `prepare`.
        synthetic: output of `synthesize` on it.

    Raises:
        UserError: inputs that do not belong together; a filter that keeps nothing.
    """
    prepared = PreparedCorpus(corpus)
    sets = question_sets(config.evaluate, config.seed, prepared, Console(quiet=True))
    return run_stage(
        "filter",
        out,
        config={"filter": config.filter.settings()},
        inputs={
            "corpus": corpus,
            "synthetic": synthetic,
            **{f"questions of {one.metric}": one.fingerprint for one in sets},
        },
        body=lambda work: _filter(config, prepared, open_synthetic(synthetic, corpus), sets, work, workers),
        console=console,
        force=force,
    )


def open_synthetic(synthetic: Path, corpus: Path) -> Corpus:
    """The documents that `synthesize` wrote from `corpus`.

    Raises:
        UserError: they were made from something else, or by a version that did not say how each was made.
    """
    made_from = read_json(synthetic / MANIFEST)["inputs"].get("corpus")
    if made_from != Manifest.load(corpus, "prepare", hashed=False).fingerprint:
        raise UserError(synthetic, f"was not made from {corpus}", "give the corpus that it was made from")
    written = Corpus(synthetic)
    missing = {"seed", "sample", "stop", "mean_log_probability"} - set(written.column_names)
    if missing:
        said = f"its documents have no {', '.join(sorted(missing))}"
        raise UserError(synthetic, said, "make it again with this version of synthesize")
    return written


def _filter(
    config: RunConfig, prepared: PreparedCorpus, written: Corpus, sets: list[QuestionSet], work: Work, workers: Workers
) -> None:
    directory = work.directory / MEASURES
    if not work.counted():
        directory.mkdir(exist_ok=True)
        shards = [
            Shard(prepared.directory, Path(written.directory), directory, number, config.filter)
            for number in range(len(written.shard_starts) - 1)
        ]
        _sift(shards, prepared, written, question_texts(sets), resolve_threads(config), work, workers)
        width, similarity = config.filter.shingle_tokens, config.filter.duplicate_similarity
        duplicates = find_duplicates(written, [shard.file("keys") for shard in shards], width, similarity)
        rejected = _count(shards, written, duplicates)
        if rejected.total() == len(written):
            shutil.rmtree(directory)  # of no use to the settings that mend it, and would stand in their way
            found = ", ".join(f"{number} {reason}" for reason, number in sorted(rejected.items()))
            remedy = "tune the synthesizer for longer, or loosen the settings under filter."
            raise UserError(written.directory, f"no document passes the filters: {found}", remedy)
        tokens = _write(shards, written, duplicates, work.directory)
        kept = len(written) - rejected.total()
        work.console.say(f"kept {kept} of {len(written)} documents; rejected: {dict(sorted(rejected.items())) or 'none'}")
        rules = rule_counts(rejected, len(written), config.filter)
        work.record(documents=len(written), documents_kept=kept, tokens_kept=tokens, rules=rules)
        work.keep_counts()
    shutil.rmtree(directory, ignore_errors=True)


def _sift(
    shards: list[Shard],
    prepared: PreparedCorpus,
    written: Corpus,
    questions: list[str],
    threads: int,
    work: Work,
    workers: Workers,
) -> None:
    """Find out about each document by itself, shard by shard."""
    write_json(shards[0].directory / QUESTIONS, questions)
    with work.console.task("documents measured", 3 * len(written), "steps") as task:
        for step in (measure_shard, None, judge_shard):
            if step is None:
                count_known(shards, prepared, questions, threads, task.advance)
                work.keep_clock()
                continue
            for documents, _ in zip(np.diff(written.shard_starts).tolist(), workers.run(step, shards, threads), strict=True):
                task.advance(documents)
                work.keep_clock()


def _count(shards: list[Shard], written: Corpus, duplicates: Duplicates) -> Counter[str]:
    """How many documents go for each reason."""
    rejected = Counter[str]()
    for shard in shards:
        reasons, _ = _verdicts(shard, written, duplicates)
        rejected.update(reasons[reasons != ""].tolist())
    return rejected


def _verdicts(shard: Shard, written: Corpus, duplicates: Duplicates) -> tuple[np.ndarray, np.ndarray]:
    """Why each document of a shard goes, "" where it stays, and what the rule measured."""
    reasons, values = judged(shard)
    documents, alike = duplicates
    first, last = written.shard_starts[shard.number : shard.number + 2]
    inside = slice(*np.searchsorted(documents, [first, last]))
    reasons[documents[inside] - first], values[documents[inside] - first] = DUPLICATE, alike[inside]
    return reasons, values


def _write(shards: list[Shard], written: Corpus, duplicates: Duplicates, directory: Path) -> int:
    """Write the kept documents, and the table of the others; returns the tokens kept."""
    writer = CorpusWriter(directory, written.vocabulary_size)
    with atomic_path(directory / REJECTED) as temporary, pq.ParquetWriter(temporary, REJECTED_SCHEMA) as others:
        for shard in shards:
            table, tokens = written.shard(shard.number)
            reasons, values = _verdicts(shard, written, duplicates)
            _write_kept(table, tokens, reasons == "", writer)
            gone = np.flatnonzero(reasons != "")
            rows = table.take(gone).select(["id", "seed", "sample", "tokens"])
            rows = rows.append_column("reason", pa.array(reasons[gone].tolist(), pa.string()))
            others.write_table(rows.append_column("value", pa.array(values[gone])).cast(REJECTED_SCHEMA))
    return writer.close().tokens


def _write_kept(table: pa.Table, tokens: np.ndarray, kept: np.ndarray, writer: CorpusWriter) -> None:
    """Add the documents of a shard that stay, with the columns they have."""
    columns = {name: table[name].filter(kept) for name in table.column_names}
    lengths = columns.pop("tokens").to_numpy()
    tokens = tokens[np.repeat(kept, table["tokens"].to_numpy())]
    ids, sources = columns.pop("id"), columns.pop("source")
    writer.add_batch(tokens, lengths, ids=ids, sources=sources, **columns)
