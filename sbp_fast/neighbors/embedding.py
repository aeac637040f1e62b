"""Embedding the unique and held-out documents of a corpus by shards, so that a killed run resumes at the last finished one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sbp_fast.config import EmbedConfig, RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.neighbors.encoders import TextEncoder, open_encoder
from sbp_fast.neighbors.vectors import Split, shard_folder, write_vectors
from sbp_fast.pipeline.executors.executor import Advance, Placement, Workers
from sbp_fast.pipeline.files import save_array
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.seals import is_sealed, seal


@dataclass(frozen=True)
class EmbeddingResult:
    """What embedding a corpus took.

    Attributes:
        device: torch device of the encoders.
        flops: floating-point operations of all vectors.
        counts: for the manifest.
    """

    device: str
    flops: float
    counts: dict[str, Any]


def embed_documents(
    config: RunConfig,
    corpus: Path,
    directory: Path,
    *,
    workers: Workers,
    console: Console,
    checkpoint: Callable[[], object],
) -> EmbeddingResult:
    """Write the vectors and lengths of the unique and the held-out documents of a corpus that are not in `directory` yet.

    Args:
        config: its `embed`, `device` and `threads`.
        corpus: output of `prepare`.
        directory: for the shards (see `Shard`).
        workers: that embed them.
        console: shows the progress.
        checkpoint: called after each shard.

    Raises:
        UserError: the model is neither installed nor reachable, its vectors are shorter than `embed.dimensions`, or of another
            dimension than those in `directory`.
    """
    prepared = PreparedCorpus(corpus)
    shard_folder(directory, "heldout").mkdir(exist_ok=True)
    shards = [
        shard
        for split in get_args(Split)
        for shard in make_shards(directory, split, len(getattr(prepared, split)), config.embed)
    ]
    _refuse_others(directory, shards)
    missing = [shard for shard in shards if not is_sealed(shard.vectors)]
    documents = sum(len(shard.rows) for shard in shards)
    done = documents - sum(len(shard.rows) for shard in missing)
    finished = next((shard for shard in shards if is_sealed(shard.vectors)), None)
    with workers.hold(partial(_open_encoder, config.embed, corpus, finished, console), config) as encoders:
        with console.task("documents embedded", documents, "documents", done=done) as task:
            for _ in encoders.run(_embed_shard, missing, task.advance):
                checkpoint()
        ((flops, counts),) = encoders.run(_summarize, [directory], lambda amount: None)
        device = encoders.placement.device
    counts = {"model": config.embed.model, "storage": config.embed.storage, **counts}
    return EmbeddingResult(device, flops, counts)


@dataclass(frozen=True)
class Shard:
    """Documents `rows` of a split, whose vectors and lengths are two files of `directory`."""

    directory: Path
    split: Split
    number: int
    rows: range
    config: EmbedConfig

    @property
    def vectors(self) -> Path:
        """The file of the vectors, [documents, dimension] as `embed.storage`; read it by `Vectors`."""
        return self.directory / f"vectors-{self.number:05d}.npy"

    @property
    def lengths(self) -> Path:
        """The file of the lengths, int64 [documents]: see `TextEncoder.lengths_of`."""
        return self.directory / f"lengths-{self.number:05d}.npy"


def make_shards(directory: Path, split: Split, documents: int, config: EmbedConfig) -> list[Shard]:
    """Divide the documents of a split into shards of `embed.shard_documents`."""
    folder, size = shard_folder(directory, split), config.shard_documents
    ranges = [range(start, min(start + size, documents)) for start in range(0, documents, size)]
    return [Shard(folder, split, number, rows, config) for number, rows in enumerate(ranges)]


def _refuse_others(directory: Path, shards: Sequence[Shard]) -> None:
    """Refuse files that look like shards of this corpus and are none: they would be read as its vectors."""
    for file in sorted({*directory.rglob("vectors-*.npy")} - {shard.vectors for shard in shards}):
        raise UserError(file, "is none of the shards of this corpus", "move it elsewhere")


Opened = tuple[TextEncoder, PreparedCorpus]


def _open_encoder(config: EmbedConfig, corpus: Path, finished: Shard | None, console: Console, placement: Placement) -> Opened:
    if not config.endpoint:
        console.say(f"loading {config.model}")
    encoder = open_encoder(config, placement.device, placement.threads)
    console.detail(f"{config.model} {encoder.description}, {encoder.batch_documents} documents at a time")
    if finished is not None and (dimension := np.load(finished.vectors, mmap_mode="r").shape[1]) != encoder.dimension:
        problem = f"has vectors of {dimension} components, and {config.model} now gives {encoder.dimension}"
        raise UserError(finished.vectors, problem, "embed the whole corpus with one model: rerun with --force")
    return encoder, PreparedCorpus(corpus)


def _embed_shard(opened: Opened, shard: Shard, advance: Advance) -> None:
    encoder, prepared = opened
    corpus = getattr(prepared, shard.split)
    texts = [prepared.text(corpus, row) for row in shard.rows]
    lengths = encoder.lengths_of(texts)
    vectors = encoder.encode(texts, advance, lengths=lengths, name=lambda row: f"document {corpus.id(shard.rows[row])}")
    save_array(shard.lengths, lengths)
    write_vectors(shard.vectors, vectors, shard.config.storage)
    seal(shard.vectors, shard.lengths)  # last: it marks the shard as finished


def _summarize(opened: Opened, directory: Path, advance: Advance) -> tuple[float, dict[str, Any]]:
    """Return the operations that all vectors took, and the counts of the encoder; all but "heldout" are of unique documents."""
    encoder, lengths, heldout = opened[0], _read_lengths(directory, "unique"), _read_lengths(directory, "heldout")
    return encoder.flops(np.concatenate([lengths, heldout])), {
        "documents": len(lengths),
        "dimension": encoder.dimension,
        **encoder.counts,
        "batch_documents": encoder.batch_documents,
        "truncated_share": float(np.mean(lengths > encoder.limit)),
        "heldout": {"documents": len(heldout), "flops": encoder.flops(heldout)},
    }


def _read_lengths(directory: Path, split: Split) -> np.ndarray:
    files = sorted(shard_folder(directory, split).glob("lengths-*.npy"))
    return np.concatenate([np.zeros(0, np.int64), *map(np.load, files)])
