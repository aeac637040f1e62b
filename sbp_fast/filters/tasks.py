"""The work of the stage `filter` on one shard of synthetic documents; each step writes a file, so that it is done once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from sbp_fast.config import FilterConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.dedup.minhash import BANDS, ROWS, token_band_keys
from sbp_fast.dedup.shingle_index import Batch, ShingleIndex, plan_passes, shingle_positions
from sbp_fast.filters.contamination import QuestionFinder, evaluation_batches
from sbp_fast.filters.features import Features, standalone_features
from sbp_fast.filters.rules import CONTAMINATED, FilterRule, judge_documents
from sbp_fast.pipeline.files import atomic_open, read_json, save_array
from sbp_fast.pipeline.seals import is_sealed, seal

QUESTIONS = "questions.json"
REAL, EVALUATION = 0, 1  # where a shingle occurs; one that occurs in both counts as real


@dataclass(frozen=True)
class FilterTask:
    """One shard of synthetic documents to filter.

    Attributes:
        corpus: output of `prepare`.
        synthetic: output of `synthesize`.
        fingerprint: of both; what a process keeps open is not that of an earlier output at the same path.
        directory: of the files that the steps write.
        number: of the shard.
        rules: those that judge a document by itself; part of the task, so that worker processes apply rules that only the
            process that started them has registered.
    """

    corpus: Path
    synthetic: Path
    fingerprint: str
    directory: Path
    number: int
    config: FilterConfig
    rules: Mapping[str, FilterRule]

    def file(self, kind: str) -> Path:
        """Return the path of a step's file."""
        return self.directory / f"{kind}-{self.number:05d}"


@lru_cache(1)
def _open(corpus: Path, synthetic: Path, fingerprint: str) -> tuple[PreparedCorpus, Corpus]:
    return PreparedCorpus(corpus), Corpus(synthetic)


@lru_cache(1)
def _question_finder(corpus: Path, questions: Path, width: int, fingerprint: str) -> QuestionFinder:
    return QuestionFinder(read_json(questions), PreparedCorpus(corpus).tokenizer, width)


def compute_features(task: FilterTask) -> None:
    """Compute the features that need no other text than each document's own and its seed's."""
    if is_sealed(task.file("standalone")):
        return
    prepared, synthetic = _open(task.corpus, task.synthetic, task.fingerprint)
    features = standalone_features(prepared, *synthetic.shard(task.number), task.config.shingle_tokens)
    with atomic_open(task.file("standalone")) as file:
        np.savez(file, **features)  # type: ignore[arg-type]
    seal(task.file("standalone"))


def count_shingles(
    tasks: Sequence[FilterTask],
    prepared: PreparedCorpus,
    questions: Sequence[str],
    threads: int,
    advance: Callable[[float], None],
) -> None:
    """Count each document's shingles that occur in unique documents, and those that occur in evaluation texts alone.

    The table of their shingles takes at most `filter.memory_gib`. If it does not hold all of them, it holds a range of hashes
    at a time, and all texts are read again for each range. Several threads hide the latency of memory.
    """
    config = tasks[0].config
    width = config.shingle_tokens
    sources: list[Callable[[], Iterable[Batch]]] = [prepared.unique.batches, lambda: evaluation_batches(prepared, questions)]
    positions = shingle_positions(prepared.unique.offsets, width) + sum(
        shingle_positions(offsets, width) for _, offsets in sources[EVALUATION]()
    )
    slots, ranges = plan_passes(positions, config.memory_gib * 2**30)
    for number, hashes in enumerate(ranges):
        remaining = [task for task in tasks if _finished_passes(task) <= number]
        if not remaining:
            continue
        index = ShingleIndex(width, slots, hashes)
        for label in (REAL, EVALUATION):
            index.add(sources[label](), label)
        with ThreadPoolExecutor(threads) as pool:
            for documents in pool.map(lambda task, index=index: _count_shard(task, index), remaining):
                advance(documents / len(ranges))


def _finished_passes(task: FilterTask) -> int:
    if not is_sealed(task.file("shingles")):
        return 0
    with np.load(task.file("shingles")) as saved:
        return int(saved["passes"])


def _count_shard(task: FilterTask, index: ShingleIndex) -> int:
    """Add the counts by one table to those of the tables before it; return the number of documents."""
    _, synthetic = _open(task.corpus, task.synthetic, task.fingerprint)
    table, tokens = synthetic.shard(task.number)
    counts = index.count((tokens, np.concatenate([[0], np.cumsum(table["tokens"].to_numpy())])))
    passes = _finished_passes(task)
    if passes:
        with np.load(task.file("shingles")) as saved:
            counts += saved["counts"]
    with atomic_open(task.file("shingles")) as file:
        np.savez(file, counts=counts, passes=passes + 1)
    seal(task.file("shingles"))
    return len(table)


def judge_shard(task: FilterTask) -> None:
    """Judge each document by itself, and write the LSH keys of those that pass."""
    if is_sealed(task.file("keys")):
        return
    prepared, synthetic = _open(task.corpus, task.synthetic, task.fingerprint)
    table, tokens = synthetic.shard(task.number)
    offsets = np.concatenate([[0], np.cumsum(table["tokens"].to_numpy())])
    bodies = [tokens[offsets[i] + 1 : offsets[i + 1] - 1] for i in range(len(table))]
    finder = _question_finder(task.corpus, task.directory / QUESTIONS, task.config.shingle_tokens, task.fingerprint)
    features = _load_features(task, prepared, table["stop"].to_numpy(zero_copy_only=False), bodies, finder)
    ids = table["id"]
    reasons, values = judge_documents(features, task.rules, task.config, lambda row: f"synthetic document {ids[row]}")
    overlaps = np.zeros((len(bodies), len(finder.tasks)), bool)
    for document in np.flatnonzero(reasons == CONTAMINATED).tolist():
        overlaps[document, finder.overlapping_tasks(bodies[document])] = True
    with atomic_open(task.file("reasons")) as file:
        np.savez(file, reasons=reasons, values=values, overlaps=overlaps)
    passing = np.flatnonzero((reasons == "") & (features.tokens > 0))
    passing_bodies = [bodies[document] for document in passing]
    joined = np.concatenate([np.zeros(0, np.uint32), *passing_bodies]).astype(np.uint32)
    keys = token_band_keys(joined, np.cumsum([0, *map(len, passing_bodies)]), task.config.shingle_tokens, BANDS, ROWS)
    numbers = (synthetic.shard_starts[task.number] + passing).astype(np.uint64)
    save_array(task.file("keys"), np.concatenate([numbers[None], keys]))
    seal(task.file("keys"), task.file("reasons"))


def _load_features(
    task: FilterTask, prepared: PreparedCorpus, stop: np.ndarray, bodies: list[np.ndarray], finder: QuestionFinder
) -> Features:
    """Return the features of a shard, from the files of the earlier steps and a search for questions."""
    with np.load(task.file("standalone")) as saved:
        standalone = dict(saved)
    with np.load(task.file("shingles")) as saved:
        shingles, *known = saved["counts"].T
    corpus_containment, evaluation_containment = (count / np.maximum(shingles, 1) for count in known)
    contains_question = np.zeros(len(bodies), bool)
    for document in np.flatnonzero(evaluation_containment > 0).tolist():
        text = prepared.tokenizer.decode(bodies[document])
        contains_question[document] = finder.contains_question(bodies[document], text)
    return Features(
        stop=stop,
        corpus_containment=corpus_containment,
        evaluation_containment=evaluation_containment,
        contains_question=contains_question,
        **standalone,
    )


def load_reasons(task: FilterTask) -> tuple[np.ndarray, np.ndarray]:
    """Return the reject reasons (object, "" where no rule rejects) and values that `judge_shard` wrote."""
    with np.load(task.file("reasons")) as saved:
        return saved["reasons"].astype(object), saved["values"]


def load_overlaps(task: FilterTask) -> np.ndarray:
    """Return which question tasks each contaminated document of a shard shares a shingle with; bool [contaminated, tasks]."""
    with np.load(task.file("reasons")) as saved:
        return np.asarray(saved["overlaps"][saved["reasons"] == CONTAMINATED])
