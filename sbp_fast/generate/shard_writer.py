"""The shards of a synthetic corpus during generation: a journal for each, replaced by the shard itself once it is complete."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.writer import shard_files, write_index, write_shard
from sbp_fast.generate.engine import GenerationResult, Seed
from sbp_fast.generate.journal import Journal
from sbp_fast.generate.seeds import NO_SEED, SeedPlan
from sbp_fast.pipeline.finite import require_finite_rows
from sbp_fast.pipeline.seals import marker_values, read_marker, write_marker

PARTS = "parts"
"""Directory of the journals, and of one file for each finished shard, inside that of the corpus."""


class ShardWriter:
    """Writes the documents of a seed plan, shard by shard, into a directory that survives a kill.

    Several threads may add documents, of several shards at a time; two processes must not work on the same shard.

    Args:
        directory: of the synthetic corpus.
        context: seeds are truncated to this many tokens.
    """

    def __init__(self, directory: Path, plan: SeedPlan, prepared: PreparedCorpus, context: int) -> None:
        self.directory, self.plan, self.prepared, self.context = directory, plan, prepared, context
        self._journals: dict[int, Journal] = {}
        self._lock = threading.Lock()

    def missing(self, among: Iterable[int] | None = None) -> list[int]:
        """Return the numbers of the unfinished shards, of all shards or of those in `among`."""
        shards = range(len(self.plan.shards)) if among is None else among
        return [shard for shard in shards if read_marker(self._entry_path(shard)) is None]

    def seeds(self, shards: Iterable[int]) -> Iterator[Seed]:
        """Yield the seeds of these shards with the samples still to be generated; not safe for concurrent iteration."""
        for shard in shards:
            with self._lock:
                generated = self._open_journal(shard)
                complete = self._is_complete(shard)
                if complete:  # killed between its last document and the writing of the shard
                    self._finish(shard)
            for number in () if complete else self.plan.shards[shard]:
                samples = tuple(sample for sample in self.plan.sample_numbers(number) if (number, sample) not in generated)
                if samples:
                    document = int(self.plan.documents[number])
                    yield Seed(number, document, self._seed_tokens(document), samples)

    def _seed_tokens(self, document: int) -> np.ndarray:
        unique = self.prepared.unique
        return np.zeros(0, unique.dtype) if document == NO_SEED else unique[document][: self.context]

    def _open_journal(self, shard: int) -> set[tuple[int, int]]:
        """Open a shard's journal; return the seed and sample of each document that earlier attempts generated."""
        (self.directory / PARTS).mkdir(exist_ok=True)  # created late: a refused stage must leave nothing behind
        self._journals[shard] = Journal(self._journal_path(shard))
        return set(self._journals[shard].results)

    def add(self, result: GenerationResult) -> None:
        """Save a document; the last one of a shard finishes the shard."""
        shard = result.seed // self.plan.shard_seeds
        with self._lock:
            self._journals[shard].add(result)
            if self._is_complete(shard):
                self._finish(shard)

    def documents(self, shards: Iterable[int]) -> int:
        """Return how many documents these shards have when they are finished."""
        return sum(len(self.plan.shards[shard]) for shard in shards) * self.plan.samples

    def journaled(self, shards: Iterable[int]) -> int:
        """Return how many documents of these unfinished shards earlier attempts generated."""
        documents = 0
        for shard in shards:
            if self._journal_path(shard).is_file():
                journal = Journal(self._journal_path(shard))
                documents += len(journal.results)
                journal.close()
        return documents

    def write_index(self) -> None:
        """Write the index of the corpus over all shards.

        Raises:
            FileNotFoundError: a shard is missing.
        """
        entries = [marker_values(self._entry_path(shard)) for shard in range(len(self.plan.shards))]
        write_index(self.directory, entries, vocabulary_size=self.prepared.tokenizer.vocabulary_size)

    def _is_complete(self, shard: int) -> bool:
        return len(self._journals[shard].results) == self.documents([shard])

    def _finish(self, shard: int) -> None:
        """Write a shard in the order of its seeds and samples, and remove its journal."""
        journal = self._journals.pop(shard)
        results = [journal.results[key] for key in sorted(journal.results)]
        tokenizer = self.prepared.tokenizer
        lengths = np.array([len(result.tokens) for result in results])
        tokens, lengths = tokenizer.enclose(np.concatenate([result.tokens for result in results]), lengths)
        table, size = pa.table(self._columns(results, lengths)), tokenizer.vocabulary_size
        entry = write_shard(self.directory, f"{shard:05d}", [tokens], table, vocabulary_size=size)
        write_marker(self._entry_path(shard), (self.directory / name for name in shard_files(entry["name"])), **entry)
        journal.close()
        self._journal_path(shard).unlink()

    def _columns(self, results: list[GenerationResult], lengths: np.ndarray) -> dict[str, Any]:
        seeds = [int(self.plan.documents[result.seed]) for result in results]
        log_probabilities = [result.log_probability / result.generated_tokens for result in results]
        names = ["none" if seed == NO_SEED else str(seed) for seed in seeds]
        ids = [f"synthetic/{name}/{result.sample}" for name, result in zip(names, results, strict=True)]
        require_finite_rows(np.array(log_probabilities), "log-probability", lambda row: f"document {ids[row]}")
        return {
            "id": ids,
            "source": ["synthetic"] * len(results),
            "text_bytes": [len(self.prepared.tokenizer.decode(result.tokens).encode()) for result in results],
            "tokens": lengths,
            "seed": seeds,
            "sample": [result.sample for result in results],
            "stop": [result.stop for result in results],
            "mean_log_probability": log_probabilities,
        }

    def _journal_path(self, shard: int) -> Path:
        return self.directory / PARTS / f"shard-{shard:05d}.journal"

    def _entry_path(self, shard: int) -> Path:
        return self.directory / PARTS / f"shard-{shard:05d}.json"
