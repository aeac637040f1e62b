"""The prepare stage: raw documents -> a tokenizer, globally shuffled token shards, and held-out documents set apart.

Documents are read once and laid down on disk by their place in the shuffled order (`spill.py`); what stays is decided on their
hashes (`selection.py`); then each part of the order is tokenized and written by itself. Reading goes file by file and writing
part by part in parallel processes, each of bounded memory, and what is finished is not done again after a kill. Nothing that
is written depends on the number of processes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.config import CorpusConfig, RunConfig, resolve_threads
from sbp_fast.data.documents import EMBEDDED, find_files, fingerprint_sources
from sbp_fast.data.encoder import EncoderName, IdsDiffer, choose_encoder, import_gigatoken
from sbp_fast.data.filesystem import user_errors
from sbp_fast.data.holdout import FACTS, Decisions, check_ids, select, set_apart
from sbp_fast.data.input_splits import cut_files
from sbp_fast.data.shuffle import Part, Reading, Spill, cut_parts, lay_down
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.tokenize import Writing, write_part
from sbp_fast.data.token_shards.writer import write_index
from sbp_fast.data.tokenizer import Tokenizer, train_tokenizer
from sbp_fast.dedup.near_duplicates import NearCopies, find_near_copies
from sbp_fast.errors import Unreachable, UserError
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.files import atomic_open, atomic_path, hash_file, read_json, write_json
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import Manifest, Work, run_stage

MINIMUM_UNIQUE = 16
PART_BYTES = 256 << 20  # of text and what comes with it, that a process holds at once; it takes about four times this
SMALL_PART_BYTES = 1 << 20  # a small corpus is cut into up to MINIMUM_PARTS parts of this, so that all processes have work
MINIMUM_PARTS = 16
COMPRESSION_RATIO = 4  # taken for compressed input; where it is more, parts are cut further
TRAINING_BYTES = 128 << 20  # of text that a tokenizer is trained on; more changes little and its word counts take memory
SPILL, SKIPPED, NEAR_COPIES = "spill", "skipped.jsonl", "near-copies.parquet"
NEAR_COPIES_SCHEMA = pa.schema({"id": pa.string(), "kept": pa.string(), "similarity": pa.float64()})


def prepare(config: RunConfig, out: Path, *, console: Console, force: bool = False, workers: Workers = LOCAL) -> Manifest:
    """Write `out`/train, `out`/heldout (each a `Corpus`) and `out`/tokenizer.json; open them with `PreparedCorpus`.

    With `corpus.on_error = "skip"` also `out`/skipped.jsonl, a line for each record that could not be used; with
    `corpus.deduplicate = "near"` `out`/near-copies.parquet, a row for each document left out.

    Raises:
        UserError: input that cannot be used (see `read_file`), too few documents, an encoder that cannot be had (see
            `choose_encoder`), and what `run_stage` refuses.
    """
    corpus = config.corpus
    if corpus.encoder == "gigatoken":
        import_gigatoken()  # missing, it is missed before everything is read
    heldout = heldout_path(corpus)
    inputs = {"documents": fingerprint_sources(corpus.path)}
    if heldout is not None:
        inputs["heldout"] = fingerprint_sources(heldout)
    if corpus.tokenizer != "train":
        Tokenizer(corpus.tokenizer)
        inputs["tokenizer"] = hash_file(Path(corpus.tokenizer))
    settings = {
        "seed": config.seed,
        "embedded": is_embedded(corpus),
        "corpus": corpus.settings(),
    }

    def body(work: Work) -> None:
        if not work.counted():
            try:
                _Preparation(config, heldout, work, workers).run()
            except BrokenProcessPool:
                raise UserError(
                    "corpus.workers",
                    "a process was killed, most likely for want of memory",
                    "rerun, it goes on where it stopped; with fewer corpus.workers if that happens again",
                ) from None
            work.keep_counts()
        shutil.rmtree(work.directory / SPILL, ignore_errors=True)

    return run_stage("prepare", out, config=settings, inputs=inputs, body=body, console=console, force=force)


def is_embedded(corpus: CorpusConfig) -> bool:
    """Whether the documents are the ones that come with the package."""
    return isinstance(corpus.path, str) and corpus.path.startswith(EMBEDDED)


def heldout_path(corpus: CorpusConfig) -> str | tuple[str, ...] | None:
    """Where the held-out documents are read from; None if they are to be set apart from the others."""
    if corpus.heldout != "auto":
        return corpus.heldout
    return f"{corpus.path}_heldout" if is_embedded(corpus) else None


class _Preparation:
    """The stage at work.

    Attributes:
        files: each file to read, and whether its documents are given to be held out.
        buckets: of the shuffled order.
    """

    def __init__(self, config: RunConfig, heldout: str | tuple[str, ...] | None, work: Work, workers: Workers) -> None:
        self.config, self.corpus, self.work, self.console = config, config.corpus, work, work.console
        self.workers, self.processes = workers, config.corpus.workers or resolve_threads(config)
        self.files = [(file, False) for file in find_files(config.corpus.path)]
        if heldout is not None:
            self.files += [(file, True) for file in find_files(heldout)]
        self.buckets = self._count_buckets()
        self.directory = work.directory / SPILL
        self.near_copies: NearCopies | None = None

    def run(self) -> None:
        self.directory.mkdir(exist_ok=True)
        try:
            read = self._read()
            spill = Spill(self.directory)
            decisions = self._set_apart(spill, read)
            parts = cut_parts(read["bucket"], self.buckets, PART_BYTES)
            if self.corpus.deduplicate == "near":
                decisions = self._without_near_copies(decisions, parts)
            kept = _count(spill, parts, decisions)
            unique = self._unique(kept["train"])
        except Unreachable:
            raise
        except UserError:
            shutil.rmtree(self.directory)  # refused input is mended before the next attempt, which reads anew
            raise
        if self.corpus.on_error == "skip":
            with atomic_open(self.work.directory / SKIPPED) as file:
                file.writelines((json.dumps(one, ensure_ascii=False) + "\n").encode() for one in spill.skipped())
        if self.near_copies is not None:
            self._list_near_copies(self.near_copies)
        tokenizer = self._tokenizer(spill, parts, decisions, unique)
        unique_texts = _head(spill, parts, decisions, unique)
        encoder, said = choose_encoder(self.corpus.encoder, tokenizer, unique_texts)
        self.console.say(f"tokenizing with {said}")
        self.work.record(encoder=said)
        self._write(parts, decisions, encoder)
        self._record(read, kept, unique, tokenizer, [read_json(self._part(number)) for number in range(len(parts))])

    def _read(self) -> dict[str, Any]:
        """Lay all files down; returns the sums of what `lay_down` counts, documents and sources of those to train on alone."""
        path = self.corpus.path
        self.console.say(f"reading {path if isinstance(path, str) else ', '.join(path)}")
        cut = cut_files([file for file, _ in self.files], self.workers, self.processes)
        spans = [(span, heldout) for (_, heldout), spans in zip(self.files, cut, strict=True) for span in spans]
        readings = [
            Reading(self.directory, span, number, heldout, self.corpus, self.config.seed, self.buckets, PART_BYTES)
            for number, (span, heldout) in enumerate(spans)
        ]
        total: dict[str, Any] = {"documents": 0, "sources": Counter(), "skipped": 0, "passages": 0, "bucket": Counter()}
        unit = "files" if len(readings) == len(self.files) else "parts of files"
        with self.console.task("reading", len(readings), unit) as task:
            for reading, counts in zip(readings, self._lay_down(readings), strict=True):
                if not reading.heldout:
                    total["documents"] += counts["documents"]
                    total["sources"].update(counts["source"])
                total["skipped"] += counts["skipped"]
                total["passages"] += counts["passages"]
                total["bucket"].update(counts["bucket"])
                self.work.keep_clock()
                task.advance(1)
        if total["skipped"]:
            self.console.say(f"skipped {total['skipped']} records that cannot be used: see {SKIPPED}")
        return total

    def _lay_down(self, readings: list[Reading]) -> Iterator[dict[str, Any]]:
        left = self.corpus.maximum_documents
        if not left:
            yield from self.workers.run(lay_down, readings, self.processes)
            return
        for reading in readings:  # one after the other: what is read of a file depends on those before it
            counts = lay_down(reading if reading.heldout else replace(reading, limit=left))
            left -= 0 if reading.heldout else counts["documents"]
            yield counts

    def _count_buckets(self) -> int:
        """How many buckets the order is cut into, by the size of the input alone."""
        size = 0
        for file, _ in self.files:
            packed = file.path.endswith((".gz", ".zst", ".parquet"))
            with user_errors(file.system, file.shown):
                stored = file.system.size(file.path) or 0  # a store may not tell: parts are then cut further
            size += stored * (COMPRESSION_RATIO if packed else 1)
        return max(1, min(MINIMUM_PARTS, size // SMALL_PART_BYTES), -(-size // PART_BYTES))

    def _set_apart(self, spill: Spill, read: dict[str, Any]) -> Decisions:
        seed = self.config.seed
        check_ids(spill, read["documents"], self.files, self.corpus, seed)
        if any(heldout for _, heldout in self.files):
            return Decisions.none()
        return set_apart(spill, read["documents"], read["sources"], self.corpus.heldout_share, seed)

    def _without_near_copies(self, decisions: Decisions, parts: list[Part]) -> Decisions:
        decisions.save(self.directory)
        self.console.say("looking for near-copies")
        found = find_near_copies(self.directory, parts, self.corpus.near_copy_similarity, self.workers, self.processes)
        self.near_copies = found
        return replace(decisions, near_copies=found.numbers)

    def _list_near_copies(self, found: NearCopies) -> None:
        columns = {"id": found.ids, "kept": found.kept, "similarity": found.similarities}
        with atomic_path(self.work.directory / NEAR_COPIES) as path:
            pq.write_table(pa.table(columns, NEAR_COPIES_SCHEMA), path)
        self.console.say(f"left out {len(found.ids)} near-copies: see {NEAR_COPIES}")

    def _unique(self, documents: int) -> int:
        share = self.corpus.unique_share
        unique = math.ceil(Fraction(str(share)) * documents)
        if unique < MINIMUM_UNIQUE:
            raise UserError(
                "corpus",
                f"{documents} documents x corpus.unique_share {share} leaves {unique}, too few to work with",
                f"give at least {MINIMUM_UNIQUE} unique documents: more input, a larger corpus.unique_share or, for few long "
                "documents, corpus.passage_characters",
            )
        return unique

    def _tokenizer(self, spill: Spill, parts: list[Part], decisions: Decisions, unique: int) -> Tokenizer:
        path = self.work.directory / "tokenizer.json"
        if path.is_file():
            return Tokenizer(path)
        if self.corpus.tokenizer == "train":
            # on the unique documents alone: the arms may not learn from the others, not even which words are common
            self.console.say(f"training a tokenizer of {self.corpus.vocabulary_size} tokens on {unique} documents")
            tokenizer = train_tokenizer(_head(spill, parts, decisions, unique), self.corpus.vocabulary_size)
        else:
            tokenizer = Tokenizer(self.corpus.tokenizer)
        tokenizer.save(path)
        return tokenizer

    def _part(self, number: int) -> Path:
        """What says that a part is written, and what it holds."""
        return self.directory / f"part-{number:05d}.json"

    def _write(self, parts: list[Part], decisions: Decisions, encoder: EncoderName) -> None:
        decisions.save(self.directory)
        output, corpus = self.work.directory, self.corpus
        how = hash_file(output / "tokenizer.json"), corpus.shard_tokens, corpus.compression, encoder
        writings = [
            Writing(output, self.directory, number, part, *how)
            for number, part in enumerate(parts)
            if not self._part(number).is_file()
        ]
        try:
            with self.console.task("tokenizing", len(parts), "parts", done=len(parts) - len(writings)) as task:
                for writing, written in zip(writings, self.workers.run(write_part, writings, self.processes), strict=True):
                    write_json(self._part(writing.number), written)
                    self.work.keep_clock()
                    task.advance(1)
        except IdsDiffer:
            self._forget(len(parts))
            raise

    def _forget(self, parts: int) -> None:
        """Remove what is written: its ids may be wrong as well, in documents that nobody compared."""
        for number in range(parts):
            self._part(number).unlink(missing_ok=True)
        for kind in ("train", "heldout"):
            shutil.rmtree(self.work.directory / kind, ignore_errors=True)

    def _record(
        self,
        read: dict[str, Any],
        kept: Counter[str],
        unique: int,
        tokenizer: Tokenizer,
        written: list[dict[str, Any]],
    ) -> None:
        train, heldout = (self._index(kind, written, tokenizer) for kind in ("train", "heldout"))
        copies, heldout_copies = kept["copies"], kept["heldout_copies"]
        if copies or heldout_copies:
            self.console.say(f"dropped {copies} exact copies and {heldout_copies} documents that are held out as well")
        text_bytes = sum(part["text_bytes"] for part in written)
        sources = sum((Counter(part["sources"]) for part in written), Counter())
        self.work.record(
            documents=len(train),
            tokens=train.tokens,
            text_bytes=text_bytes,
            unique_documents=unique,
            unique_tokens=train.prefix(unique).tokens,
            heldout_documents=len(heldout),
            heldout_tokens=heldout.tokens,
            passages_cut=read["passages"],
            copies_dropped=copies,
            heldout_copies_dropped=heldout_copies,
            near_copies_dropped=kept["near_copies"],
            records_skipped=read["skipped"],
            vocabulary_size=tokenizer.vocabulary_size,
            bytes_per_token=text_bytes / (train.tokens - 2 * len(train)),
            sources=dict(sorted(sources.items())),
            embedded=is_embedded(self.corpus),
        )

    def _index(self, kind: str, written: list[dict[str, Any]], tokenizer: Tokenizer) -> Corpus:
        shards = [shard for part in written for shard in part[kind]]
        return write_index(
            self.work.directory / kind,
            shards,
            vocabulary_size=tokenizer.vocabulary_size,
            compression=self.corpus.compression,
        )


def _count(spill: Spill, parts: list[Part], decisions: Decisions) -> Counter[str]:
    """How many documents stay to train on, and how many go for either reason."""
    kept: Counter[str] = Counter()
    for part in parts:
        table = spill.rows(part, FACTS)
        chosen = select({name: table[name].to_numpy() for name in FACTS}, decisions)
        kept.update(
            train=len(chosen.train),
            copies=chosen.copies,
            heldout_copies=chosen.heldout_copies,
            near_copies=chosen.near_copies,
        )
    return kept


def _head(spill: Spill, parts: list[Part], decisions: Decisions, documents: int) -> Iterator[str]:
    """The texts of the first documents of the shuffled order, up to TRAINING_BYTES of them."""
    size = 0
    for part in parts:
        table = spill.rows(part, [*FACTS, "text"])
        chosen = select({name: table[name].to_numpy() for name in FACTS}, decisions).train[:documents]
        documents -= len(chosen)
        for text in table["text"].take(chosen):
            size += len(text.as_buffer())
            yield text.as_py()
            if size >= TRAINING_BYTES:
                return
        if not documents:
            return
