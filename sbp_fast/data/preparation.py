"""The work of `prepare`: raw documents -> a tokenizer, globally shuffled token shards, and a holdout split.

Documents are read once and written to disk by their position in the shuffled order (`shuffle.py`); which of them stay is
decided on their hashes (`holdout.py`); then each partition of the order is tokenized and written by itself
(`token_shards/tokenize.py`). Reading is parallel over files and splits of files, tokenizing over partitions, each task in
bounded memory; a task that an earlier attempt finished is not done again. No output depends on the number of processes.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.config import RunConfig, resolve_threads
from sbp_fast.data.documents import heldout_path, is_embedded, resolve_separator
from sbp_fast.data.encoder import EncoderName, IdsDiffer, choose_encoder
from sbp_fast.data.holdout import (
    Decisions,
    check_ids,
    choose_holdout,
    choose_validation,
    count_originals,
)
from sbp_fast.data.input_files import FoundFiles, search_files, shorten
from sbp_fast.data.input_splits import group_files, split_files
from sbp_fast.data.prepared import VALIDATION
from sbp_fast.data.round_trip import check_round_trips
from sbp_fast.data.selected import count_selected, head_texts
from sbp_fast.data.shuffle import (
    ShufflePartition,
    ShuffleReader,
    ShuffleWriteTask,
    plan_partitions,
    shuffle_write,
)
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.tokenize import TokenizeTask, write_partition
from sbp_fast.data.token_shards.writer import shard_files, write_index
from sbp_fast.data.tokenizer import TOKENIZER, Tokenizer, train_tokenizer
from sbp_fast.dedup.near_duplicates import NearDuplicates, find_near_duplicates
from sbp_fast.errors import UserError
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.files import atomic_open, atomic_path, dump_json, hash_file, save_array
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.seals import is_sealed, marker_values, read_marker, seal, write_marker

MINIMUM_UNIQUE = 16
PARTITION_BYTES = 256 << 20  # of text and its columns, held by a process at once; its memory is about four times this
SMALL_PARTITION_BYTES = 1 << 20  # a small corpus has up to MINIMUM_PARTITIONS of this size, so that all processes have work
MINIMUM_PARTITIONS = 16
COMPRESSION_RATIO = 4  # assumed of compressed input; where it is larger, buckets are divided further
SKIPPED, NEAR_DUPLICATES = "skipped.jsonl", "near-duplicates.parquet"
NEAR_DUPLICATES_SCHEMA = pa.schema({"id": pa.string(), "kept": pa.string(), "similarity": pa.float64()})


class Preparation:
    """Prepares a corpus in a directory, resuming from what it finds there.

    Args:
        config: of the run.
        directory: the output.
        scratch: a directory for the shuffled documents, which the caller removes afterwards.
        console: for progress.
        record: called with counts for the manifest.
        save_clock: called after each durable step.
        workers: who does the tasks.

    Attributes:
        files: each input file, and whether its documents are given to be held out; those of named unique documents first.
        unique_files: number of files of named unique documents.
        left_out: what lies beside the files and is not read.
        buckets: of the shuffled order.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        scratch: Path,
        *,
        console: Console,
        record: Callable[..., None],
        save_clock: Callable[[], None],
        workers: Workers,
    ) -> None:
        self.config, self.corpus, self.directory, self.scratch = config, config.corpus, directory, scratch
        self.console, self.record, self.save_clock = console, record, save_clock
        self.workers, self.processes = workers, config.corpus.workers or resolve_threads(config)
        heldout = heldout_path(config.corpus)
        paths = [(config.corpus.unique, False), (config.corpus.path, False), (heldout, True)]
        found = [(search_files(path), held) if path else (FoundFiles(), held) for path, held in paths]
        self.files = [(file, held) for part, held in found for file in part.files]
        self.unique_files = len(found[0][0].files)
        self.left_out = [part for part, _ in found]
        self.buckets = self._count_buckets()

    def run(self) -> None:
        """Prepare the corpus.

        Raises:
            UserError: input that cannot be used, too few documents, an encoder that is not available.
        """
        near_duplicates = None
        read = self._read()
        shuffled = ShuffleReader(self.scratch)
        decisions = self._choose_holdout(shuffled, read)
        partitions = plan_partitions(read["bucket"], self.buckets, PARTITION_BYTES)
        if self.corpus.deduplicate == "near":
            near_duplicates = self._find_near_duplicates(decisions, partitions)
            decisions = replace(decisions, near_duplicates=near_duplicates.indices)
        selected, heldout_originals = count_selected(shuffled, partitions, decisions)
        unique = self._count_unique(selected, len(heldout_originals))
        validation = choose_validation(heldout_originals, self.corpus.validation_share)
        save_array(self.directory / VALIDATION, validation)
        if self.corpus.on_error == "skip":
            with atomic_open(self.directory / SKIPPED) as file:
                file.writelines((dump_json(entry, SKIPPED, ensure_ascii=False) + "\n").encode() for entry in shuffled.skipped())
        if near_duplicates is not None:
            self._list_near_duplicates(near_duplicates)
        tokenizer = self._load_or_train_tokenizer(shuffled, partitions, decisions, unique)
        unique_texts = head_texts(shuffled, partitions, decisions, unique)
        if self.corpus.tokenizer != "train":
            losses = check_round_trips(tokenizer, unique_texts, lossy=self.corpus.lossy_tokenizer)
            self.record(**losses)
            unique_texts = head_texts(shuffled, partitions, decisions, unique)
        encoder, description = choose_encoder(self.corpus.encoder, tokenizer, unique_texts)
        self.console.say(f"tokenizing with {description}")
        self.record(encoder=description)
        self._tokenize(partitions, decisions, encoder)
        written = [marker_values(self._written_path(index)) for index in range(len(partitions))]
        self._finish(read, selected, unique, len(validation), tokenizer, written)

    def _read(self) -> dict[str, Any]:
        """Shuffle-write all files; returns the sums of what `shuffle_write` counts, "documents" of training alone."""
        path = self.corpus.path
        self.console.say(f"reading {path if isinstance(path, str) else ', '.join(path)}")
        tasks = self._read_tasks()
        total: dict[str, Any] = {"documents": 0, "sources": Counter(), "skipped": 0, "bucket": Counter()}
        total |= {"passages": 0, "other_sources": 0, "recoded": 0, "read": Counter()}
        parts = sum(len(task.files) for task in tasks)
        unit = "files" if parts == len(self.files) else "splits of files"
        with self.console.task("reading", parts, unit) as progress:
            for task, counts in zip(tasks, self._shuffle_write(tasks), strict=True):
                if not task.heldout:
                    total["documents"] += counts["documents"]
                total["sources"].update(counts["source"])
                for kind in ("skipped", "passages", "other_sources", "recoded"):
                    total[kind] += counts[kind]
                total["bucket"].update(counts["bucket"])
                for number, file in enumerate(task.files):
                    total["read"][file.shown] += counts["read"].get(str(number), 0)
                self.save_clock()
                progress.advance(len(task.files))
        self._report_read(total)
        return total

    def _read_tasks(self) -> list[ShuffleWriteTask]:
        """Return the tasks that read all files, in the order of reading; a function of the files alone."""
        splits = split_files([file for file, _ in self.files], self.workers, self.processes)
        kinds = [
            (heldout, number < self.unique_files if self.unique_files else None)
            for number, (_, heldout) in enumerate(self.files)
        ]
        inputs = [
            (tuple(group), kind)
            for kind, same in groupby(zip(kinds, splits, strict=True), itemgetter(0))
            for group in group_files(file for _, parts in same for file in parts)
        ]
        config, seed, buckets = self.corpus, self.config.seed, self.buckets
        return [
            ShuffleWriteTask(self.scratch, files, index, heldout, unique, config, seed, buckets, PARTITION_BYTES)
            for index, (files, (heldout, unique)) in enumerate(inputs)
        ]

    def _report_read(self, total: dict[str, Any]) -> None:
        """Print what was not read, and refuse an input of which nothing was."""
        empty = [file for file, records in total["read"].items() if not records]
        if empty and not self.corpus.maximum_documents:
            self.console.say(f"left out {len(empty)}: files without documents: {shorten(empty)}")
        for found in self.left_out:
            for line in found.describe():
                self.console.say(line)
        if missing := set(self.corpus.sources) - total["sources"].keys():
            known = f"left out were {total['other_sources']} documents of other sources"
            raise UserError(f"corpus.sources = {min(missing)}", f"no document is of this source; {known}", "correct the name")
        if total["other_sources"]:
            self.console.say(
                f"left out {total['other_sources']} documents of other sources than {', '.join(self.corpus.sources)}"
            )
        if total["recoded"]:
            self.console.say(f"{total['recoded']} documents have other tokens than their files")
        if total["skipped"]:
            self.console.say(f"records that cannot be used, skipped: {total['skipped']}; see {SKIPPED}")
        if not total["documents"]:
            path = self.corpus.path if isinstance(self.corpus.path, str) else ", ".join(self.corpus.path)
            problem = f"holds no documents that can be used; records skipped: {total['skipped']}"
            raise UserError(path, problem, "give files with documents")

    def _shuffle_write(self, tasks: list[ShuffleWriteTask]) -> Iterator[dict[str, Any]]:
        left = dict.fromkeys((False, True), self.corpus.maximum_documents)  # of documents, and of given held-out ones
        if not self.corpus.maximum_documents:
            yield from self.workers.run(shuffle_write, tasks, self.processes)
            return
        for task in tasks:  # one after the other: how much of a file is read depends on the files before it
            counts = shuffle_write(replace(task, limit=left[task.heldout]))
            left[task.heldout] -= counts["documents"]
            yield counts

    def _count_buckets(self) -> int:
        """Return the number of buckets of the order, a function of the size of the input alone."""
        size = 0
        for file, _ in self.files:
            stored = file.stored_bytes() or 0  # a store may not tell: buckets are then divided further
            size += stored * (COMPRESSION_RATIO if file.compressed else 1)
        return max(1, min(MINIMUM_PARTITIONS, size // SMALL_PARTITION_BYTES), -(-size // PARTITION_BYTES))

    def _choose_holdout(self, shuffled: ShuffleReader, read: dict[str, Any]) -> Decisions:
        seed = self.config.seed
        check_ids(shuffled, read["documents"], self.files, self.corpus, seed)
        if separator := resolve_separator(self.corpus):
            originals = count_originals(shuffled, read["documents"], Decisions.of_sources(read["sources"], seed))
            self.console.say(
                f"ids up to the last {separator!r} join {originals['joined_documents']} documents to "
                f"{originals['joined_originals']} originals, {originals['largest_original']} in the largest"
            )
            self.record(**originals)
        if any(heldout for _, heldout in self.files):
            return Decisions.of_sources(read["sources"], seed)
        return choose_holdout(shuffled, read["documents"], read["sources"], self.corpus.heldout_share, seed)

    def _find_near_duplicates(self, decisions: Decisions, partitions: list[ShufflePartition]) -> NearDuplicates:
        decisions.save(self.scratch)
        self.console.say("looking for near-duplicates")
        similarity = self.corpus.near_duplicate_similarity
        return find_near_duplicates(self.scratch, partitions, similarity, self.workers, self.processes)

    def _list_near_duplicates(self, dropped: NearDuplicates) -> None:
        columns = {"id": dropped.ids, "kept": dropped.kept, "similarity": dropped.similarities}
        with atomic_path(self.directory / NEAR_DUPLICATES) as path:
            pq.write_table(pa.table(columns, NEAR_DUPLICATES_SCHEMA), path)
        self.console.say(f"left out {len(dropped.ids)} near-duplicates: see {NEAR_DUPLICATES}")

    def _count_unique(self, selected: Counter[str], heldout: int) -> int:
        documents, share = selected["train"], self.corpus.unique_share
        if self.unique_files:
            unique, origin = selected["first_half"], "corpus.unique"
        else:
            unique, origin = math.ceil(Fraction(str(share)) * documents), f"{documents} documents x corpus.unique_share {share}"
        if unique < MINIMUM_UNIQUE:
            raise UserError(
                "corpus",
                f"{origin} leaves {unique}, too few to work with ({heldout} are held out; dropped were "
                f"{selected['duplicates']} exact duplicates, {selected['heldout_duplicates']} that are held out as well, "
                f"{selected['near_duplicates']} near-duplicates)",
                f"give at least {MINIMUM_UNIQUE} unique documents: more input, a larger corpus.unique_share or, for few long "
                "documents, corpus.passage_characters",
            )
        return unique

    def _load_or_train_tokenizer(
        self, shuffled: ShuffleReader, partitions: list[ShufflePartition], decisions: Decisions, unique: int
    ) -> Tokenizer:
        path = self.directory / TOKENIZER
        if is_sealed(path):
            return Tokenizer(path)
        if self.corpus.tokenizer == "train":
            # on the unique documents alone: the arms may not learn from the others, not even which words are common
            self.console.say(f"training a tokenizer of {self.corpus.vocabulary_size} tokens on {unique} documents")
            texts = head_texts(shuffled, partitions, decisions, unique)
            tokenizer = train_tokenizer(texts, self.corpus.vocabulary_size)
        else:
            tokenizer = Tokenizer(self.corpus.tokenizer)
        tokenizer.save(path)
        seal(path)
        return tokenizer

    def _written_path(self, index: int) -> Path:
        """Return the file that says that a partition is written, and what it holds."""
        return self.scratch / f"partition-{index:05d}.json"

    def _shard_files(self, written: dict[str, Any]) -> list[Path]:
        """Return the files of a partition's shards."""
        shards = [(self.directory / split, entry["name"]) for split in ("train", "heldout") for entry in written[split]]
        return [folder / name for folder, shard in shards for name in shard_files(shard)]

    def _tokenize(self, partitions: list[ShufflePartition], decisions: Decisions, encoder: EncoderName) -> None:
        decisions.save(self.scratch)
        settings = hash_file(self.directory / TOKENIZER), self.corpus.shard_tokens, self.corpus.compression, encoder
        tasks = [
            TokenizeTask(self.directory, self.scratch, index, partition, *settings)
            for index, partition in enumerate(partitions)
            if read_marker(self._written_path(index)) is None
        ]
        finished = len(partitions) - len(tasks)
        try:
            with self.console.task("tokenizing", len(partitions), "partitions", done=finished) as progress:
                results = self.workers.run(write_partition, tasks, self.processes)
                for task, written in zip(tasks, results, strict=True):
                    write_marker(self._written_path(task.index), self._shard_files(written), **written)
                    self.save_clock()
                    progress.advance(1)
        except IdsDiffer:
            self._remove_written(len(partitions))
            raise

    def _remove_written(self, partitions: int) -> None:
        """Remove the partitions written so far: their ids may be wrong too, in documents that were not compared."""
        for index in range(partitions):
            self._written_path(index).unlink(missing_ok=True)
        for split in ("train", "heldout"):
            shutil.rmtree(self.directory / split, ignore_errors=True)

    def _finish(
        self,
        read: dict[str, Any],
        selected: Counter[str],
        unique: int,
        validation: int,
        tokenizer: Tokenizer,
        written: list[dict[str, Any]],
    ) -> None:
        """Write the indices of both splits and record the counts."""
        train, heldout = (self._write_index(split, written, tokenizer) for split in ("train", "heldout"))
        duplicates, heldout_duplicates = selected["duplicates"], selected["heldout_duplicates"]
        if duplicates or heldout_duplicates:
            also = f"{heldout_duplicates} documents that are held out as well"
            self.console.say(f"dropped {duplicates} exact duplicates and {also}")
        text_bytes = sum(partition["text_bytes"] for partition in written)
        sources = sum((Counter(partition["sources"]) for partition in written), Counter())
        self.record(
            documents=len(train),
            tokens=train.tokens,
            text_bytes=text_bytes,
            unique_documents=unique,
            unique_tokens=train.prefix(unique).tokens,
            heldout_documents=len(heldout),
            heldout_tokens=heldout.tokens,
            validation_documents=validation,
            test_documents=len(heldout) - validation,
            passages_cut=read["passages"],
            duplicates_dropped=duplicates,
            heldout_duplicates_dropped=heldout_duplicates,
            near_duplicates_dropped=selected["near_duplicates"],
            records_skipped=read["skipped"],
            other_sources=read["other_sources"],
            recoded=read["recoded"],
            empty_files=sum(not records for records in read["read"].values()),
            left_out={reason: len(names) for found in self.left_out for reason, names in found.left_out.items()},
            vocabulary_size=tokenizer.vocabulary_size,
            bytes_per_token=text_bytes / (train.tokens - 2 * len(train)),
            sources=dict(sorted(sources.items())),
            embedded=is_embedded(self.corpus),
        )

    def _write_index(self, split: str, written: list[dict[str, Any]], tokenizer: Tokenizer) -> Corpus:
        shards = [shard for partition in written for shard in partition[split]]
        return write_index(
            self.directory / split,
            shards,
            vocabulary_size=tokenizer.vocabulary_size,
            compression=self.corpus.compression,
        )
