"""What the stage `filter` does to one shard of synthetic documents, each step in a file of its own so that it is done once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from sbp_fast.filters.features import Measures, measure_alone
from sbp_fast.filters.rules import judge
from sbp_fast.pipeline.files import atomic_open, read_json, save_array

QUESTIONS = "questions.json"
REAL, EVALUATION = 0, 1  # where a shingle is known from: what both have is real


@dataclass(frozen=True)
class Shard:
    """Shard `number` of the documents in `synthetic`; what is found out about it goes to `directory`."""

    corpus: Path
    synthetic: Path
    directory: Path
    number: int
    config: FilterConfig

    def file(self, kind: str) -> Path:
        return self.directory / f"{kind}-{self.number:05d}"


@lru_cache(1)
def _opened(corpus: Path, synthetic: Path) -> tuple[PreparedCorpus, Corpus]:
    return PreparedCorpus(corpus), Corpus(synthetic)


@lru_cache(1)
def _finder(corpus: Path, questions: Path, width: int) -> QuestionFinder:
    return QuestionFinder(read_json(questions), PreparedCorpus(corpus).tokenizer, width)


def measure_shard(shard: Shard) -> None:
    """Measure what needs no other text than each document's own and its seed's."""
    if shard.file("alone").is_file():
        return
    prepared, written = _opened(shard.corpus, shard.synthetic)
    found = measure_alone(prepared, *written.shard(shard.number), shard.config.shingle_tokens)
    with atomic_open(shard.file("alone")) as file:
        np.savez(file, **found)  # type: ignore[arg-type]


def count_known(
    shards: Sequence[Shard], prepared: PreparedCorpus, questions: Sequence[str], threads: int, advance: Callable[[float], None]
) -> None:
    """Count of each document the shingles that unique documents have, and those that evaluation texts alone have.

    The table of their shingles takes `filter.memory_gib` at most. If it does not hold all, it holds a range of hashes at a
    time, and all texts are read again for each. Other threads look up while one waits for memory.
    """
    config = shards[0].config
    width = config.shingle_tokens
    known: list[Callable[[], Iterable[Batch]]] = [prepared.unique.batches, lambda: evaluation_batches(prepared, questions)]
    positions = shingle_positions(prepared.unique.offsets, width) + sum(
        shingle_positions(offsets, width) for _, offsets in known[EVALUATION]()
    )
    slots, ranges = plan_passes(positions, config.memory_gib * 2**30)
    for number, hashes in enumerate(ranges):
        left = [shard for shard in shards if _passes_done(shard) <= number]
        if not left:
            continue
        index = ShingleIndex(width, slots, hashes)
        for label in (REAL, EVALUATION):
            index.add(known[label](), label)
        with ThreadPoolExecutor(threads) as pool:
            for documents in pool.map(lambda shard, index=index: _count_shard(shard, index), left):
                advance(documents / len(ranges))


def _passes_done(shard: Shard) -> int:
    if not shard.file("known").is_file():
        return 0
    with np.load(shard.file("known")) as found:
        return int(found["passes"])


def _count_shard(shard: Shard, index: ShingleIndex) -> int:
    """Add what one table knows to the counts of the ones before; returns the documents."""
    _, written = _opened(shard.corpus, shard.synthetic)
    table, tokens = written.shard(shard.number)
    counts = index.count((tokens, np.concatenate([[0], np.cumsum(table["tokens"].to_numpy())])))
    passes = _passes_done(shard)
    if passes:
        with np.load(shard.file("known")) as found:
            counts += found["counts"]
    with atomic_open(shard.file("known")) as file:
        np.savez(file, counts=counts, passes=passes + 1)
    return len(table)


def judge_shard(shard: Shard) -> None:
    """Judge each document by itself, and write the keys by which those that pass are compared with each other."""
    if shard.file("keys").is_file():
        return
    prepared, written = _opened(shard.corpus, shard.synthetic)
    table, tokens = written.shard(shard.number)
    with np.load(shard.file("alone")) as found:
        alone = dict(found)
    with np.load(shard.file("known")) as found:
        shingles, *known = found["counts"].T
    in_corpus, in_evaluation = (count / np.maximum(shingles, 1) for count in known)
    offsets = np.concatenate([[0], np.cumsum(table["tokens"].to_numpy())])
    bodies = [tokens[offsets[i] + 1 : offsets[i + 1] - 1] for i in range(len(table))]
    holds = np.zeros(len(table), bool)
    finder = _finder(shard.corpus, shard.directory / QUESTIONS, shard.config.shingle_tokens)
    for document in np.flatnonzero(in_evaluation > 0).tolist():
        holds[document] = finder.holds(bodies[document], prepared.tokenizer.decode(bodies[document]))
    stop = table["stop"].to_numpy(zero_copy_only=False)
    others = {"in_corpus": in_corpus, "in_evaluation": in_evaluation, "holds_question": holds}
    reasons, values = judge(Measures(stop=stop, **alone, **others), shard.config)
    with atomic_open(shard.file("judged")) as file:
        np.savez(file, reasons=reasons, values=values)
    passing = np.flatnonzero((reasons == "") & (alone["tokens"] > 0))
    kept = [bodies[document] for document in passing]
    joined = np.concatenate([np.zeros(0, np.uint32), *kept]).astype(np.uint32)
    keys = token_band_keys(joined, np.cumsum([0, *map(len, kept)]), shard.config.shingle_tokens, BANDS, ROWS)
    numbers = (written.shard_starts[shard.number] + passing).astype(np.uint64)
    save_array(shard.file("keys"), np.concatenate([numbers[None], keys]))


def judged(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """The reasons and values that `judge_shard` found."""
    with np.load(shard.file("judged")) as found:
        return found["reasons"].astype("<U16"), found["values"]
