"""The shards of a synthetic corpus while they are drawn: a journal each, and the shard itself once it is complete."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.writer import write_index, write_shard
from sbp_fast.generate.engine import Draft, Seed
from sbp_fast.generate.journal import Journal
from sbp_fast.generate.seeds import SeedPlan
from sbp_fast.pipeline.files import read_json, write_json

PARTS = "parts"


class Parts:
    """What is drawn of a plan, in a directory that outlives a kill.

    Many threads may add drafts, of several shards at a time; two processes must not work on the same shard.

    Args:
        directory: of the synthetic corpus.
        context: seeds are cut to this.
    """

    def __init__(self, directory: Path, plan: SeedPlan, prepared: PreparedCorpus, context: int) -> None:
        self.directory, self.plan, self.prepared, self.context = directory, plan, prepared, context
        self._journals: dict[int, Journal] = {}
        self._lock = threading.Lock()

    def missing(self, among: Iterable[int] | None = None) -> list[int]:
        """Numbers of the shards that are not finished, of all or of some."""
        shards = range(len(self.plan.shards)) if among is None else among
        return [shard for shard in shards if not self._entry(shard).is_file()]

    def seeds(self, shards: Iterable[int]) -> Iterator[Seed]:
        """The seeds of these shards, with the samples that are not drawn yet; one thread may ask at a time."""
        for shard in shards:
            with self._lock:
                drawn = self._open(shard)
                whole = self._is_whole(shard)
                if whole:  # killed after its last document
                    self._finish(shard)
            for number in () if whole else self.plan.shards[shard]:
                samples = tuple(sample for sample in self.plan.sample_numbers(number) if (number, sample) not in drawn)
                if samples:
                    document = int(self.plan.documents[number])
                    yield Seed(number, document, self.prepared.unique[document][: self.context], samples)

    def _open(self, shard: int) -> set[tuple[int, int]]:
        """What earlier attempts have drawn of a shard."""
        (self.directory / PARTS).mkdir(exist_ok=True)  # not before: a stage that is refused leaves nothing
        self._journals[shard] = Journal(self._journal(shard))
        return set(self._journals[shard].drafts)

    def add(self, draft: Draft) -> None:
        """Keep a document; with its last one a shard is finished."""
        shard = draft.seed // self.plan.shard_seeds
        with self._lock:
            self._journals[shard].add(draft)
            if self._is_whole(shard):
                self._finish(shard)

    def documents(self, shards: Iterable[int]) -> int:
        """How many documents these shards will have."""
        return sum(len(self.plan.shards[shard]) for shard in shards) * self.plan.samples

    def drawn(self, shards: Iterable[int]) -> int:
        """Documents of unfinished shards that earlier attempts have drawn."""
        found = 0
        for shard in shards:
            if self._journal(shard).is_file():
                journal = Journal(self._journal(shard))
                found += len(journal.drafts)
                journal.close()
        return found

    def join(self) -> None:
        """Write the index over all shards.

        Raises:
            FileNotFoundError: one is missing.
        """
        entries = [read_json(self._entry(shard)) for shard in range(len(self.plan.shards))]
        write_index(self.directory, entries, vocabulary_size=self.prepared.tokenizer.vocabulary_size)

    def _is_whole(self, shard: int) -> bool:
        return len(self._journals[shard].drafts) == self.documents([shard])

    def _finish(self, shard: int) -> None:
        """Write the shard, in the order of its seeds and samples, and forget its journal."""
        journal = self._journals.pop(shard)
        drafts = [journal.drafts[key] for key in sorted(journal.drafts)]
        tokenizer = self.prepared.tokenizer
        lengths = np.array([len(draft.tokens) for draft in drafts])
        tokens, lengths = tokenizer.enclose(np.concatenate([draft.tokens for draft in drafts]), lengths)
        table, size = pa.table(self._columns(drafts, lengths)), tokenizer.vocabulary_size
        entry = write_shard(self.directory, f"{shard:05d}", [tokens], table, vocabulary_size=size)
        write_json(self._entry(shard), entry)
        journal.close()
        self._journal(shard).unlink()

    def _columns(self, drafts: list[Draft], lengths: np.ndarray) -> dict[str, Any]:
        seeds = [int(self.plan.documents[draft.seed]) for draft in drafts]
        return {
            "id": [f"synthetic/{seed}/{draft.sample}" for seed, draft in zip(seeds, drafts, strict=True)],
            "source": ["synthetic"] * len(drafts),
            "text_bytes": [len(self.prepared.tokenizer.decode(draft.tokens).encode()) for draft in drafts],
            "tokens": lengths,
            "seed": seeds,
            "sample": [draft.sample for draft in drafts],
            "stop": [draft.stop for draft in drafts],
            "mean_log_probability": [draft.log_probability / draft.drawn for draft in drafts],
        }

    def _journal(self, shard: int) -> Path:
        return self.directory / PARTS / f"shard-{shard:05d}.journal"

    def _entry(self, shard: int) -> Path:
        return self.directory / PARTS / f"shard-{shard:05d}.json"
