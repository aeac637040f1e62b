"""Vectors made elsewhere, joined by id to the documents of a corpus and written as those of an encoder are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.config import EmbedConfig
from sbp_fast.config.embed import OF_FILE
from sbp_fast.data.by_id import DocumentIds
from sbp_fast.data.input_files import shorten
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.neighbors.embedding import make_shards
from sbp_fast.neighbors.vector_files import VectorBatch, read_vectors
from sbp_fast.neighbors.vectors import Split, check_lengths, shard_folder, write_vectors
from sbp_fast.pipeline.progress import Console, Task
from sbp_fast.pipeline.seals import is_sealed, seal

HELDOUT: dict[Split, bool] = {"unique": False, "heldout": True}
REMEDY = "correct the vector, or leave the document out of the corpus"


def import_vectors(
    config: EmbedConfig,
    prepared: PreparedCorpus,
    directory: Path,
    scratch: Path,
    *,
    console: Console,
    checkpoint: Callable[[], object],
) -> dict[str, Any]:
    """Write the vectors of `embed.file` in the order of the corpus, at unit length.

    They go through a file of their size in `scratch`; of the vectors only a batch is in memory.

    Args:
        config: its `file`, `dimensions`, `storage` and `shard_documents`.
        prepared: the corpus whose unique and held-out documents they are of.
        directory: for the shards.
        scratch: for the file on the way.
        console: shows the progress.
        checkpoint: called after each shard.

    Returns:
        Counts for the manifest; `extra` are the vectors of no unique and no held-out document, which are left out.

    Raises:
        UserError: see `read_vectors`; a document without a vector or with two, a vector whose length is 0 or not finite, or
            one shorter than `embed.dimensions`.
    """
    joined = {split: _JoinedVectors(scratch / f"{split}.float32", len(getattr(prepared, split))) for split in HELDOUT}
    total = sum(len(vectors.present) for vectors in joined.values())
    with console.task("vectors joined", total, "documents") as task:
        dimension, extra = _join(config, DocumentIds(prepared), joined, task)
    _refuse_missing(prepared, joined)
    shard_folder(directory, "heldout").mkdir(exist_ok=True)
    if extra:
        console.say(f"{extra} vectors left out: of documents that are neither unique nor held out")
    for split, vectors in joined.items():
        rows = vectors.open(dimension)
        for shard in make_shards(directory, split, len(vectors.present), config):
            if not is_sealed(shard.vectors):
                write_vectors(shard.vectors, rows[shard.rows.start : shard.rows.stop], config.storage)
                seal(shard.vectors)
                checkpoint()
    return {
        "model": OF_FILE,
        "storage": config.storage,
        "documents": len(joined["unique"].present),
        "dimension": dimension,
        "extra": extra,
        "heldout": {"documents": len(joined["heldout"].present)},
    }


class _JoinedVectors:
    """Vectors of one split on disk, written in any order; `present` says which are there."""

    def __init__(self, path: Path, documents: int) -> None:
        self.path, self.present = path, np.zeros(documents, bool)
        path.write_bytes(b"")

    def write(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Write float32 vectors at rows, those of adjacent rows at once: a memory map would not report a full disk."""
        order = np.argsort(rows)
        with self.path.open("r+b") as file:
            for run in np.split(order, np.flatnonzero(np.diff(rows[order]) != 1) + 1):
                file.seek(int(rows[run[0]]) * vectors[0].nbytes)
                file.write(vectors[run].tobytes())
        self.present[rows] = True

    def open(self, dimension: int) -> np.ndarray:
        """Return the vectors, float32 [documents, dimension], as a memory map."""
        return np.memmap(self.path, np.float32, "r", shape=(len(self.present), dimension))


def _join(config: EmbedConfig, ids: DocumentIds, joined: dict[Split, _JoinedVectors], task: Task) -> tuple[int, int]:
    """Write the vectors of all files to their rows; return their dimension and how many are of no document."""
    dimension = extra = 0
    for batch in read_vectors(config.file):
        documents = [ids.find(id, batch.where(row)) for row, id in enumerate(batch.ids)]
        dimension = _dimension(config, batch)
        extra += documents.count(None)
        for split, heldout in HELDOUT.items():
            chosen = [row for row, document in enumerate(documents) if document is not None and document.heldout == heldout]
            rows = np.array([document.row for document in documents if document is not None and document.heldout == heldout])
            if chosen:
                _refuse_second(joined[split], rows, chosen, batch)
                joined[split].write(rows, _unit_vectors(batch, chosen, dimension))
                task.advance(len(chosen))
    return dimension, extra


def _dimension(config: EmbedConfig, batch: VectorBatch) -> int:
    """Return how many components of each vector are kept."""
    dimension = batch.vectors.shape[1]
    if config.dimensions > dimension:
        problem = f"its vectors have {dimension} components"
        raise UserError(f"embed.dimensions = {config.dimensions}", problem, "set it to no more")
    return config.dimensions or dimension


def _refuse_second(joined: _JoinedVectors, rows: np.ndarray, chosen: list[int], batch: VectorBatch) -> None:
    """Refuse the second vector of a document, whether the first one is in this batch or in an earlier one."""
    _, first = np.unique(rows, return_index=True)
    second = joined.present[rows]
    second[np.setdiff1d(np.arange(len(rows)), first)] = True
    if second.any():
        row = chosen[int(np.argmax(second))]
        raise UserError(batch.where(row), f"a second vector of the document {batch.ids[row]!r}", "give one for each document")


def _unit_vectors(batch: VectorBatch, chosen: list[int], dimension: int) -> np.ndarray:
    """Return some vectors of a batch at unit length, float32 [vectors, dimension]."""
    vectors = batch.vectors[chosen, :dimension]
    with np.errstate(over="ignore"):  # an infinite length is refused
        lengths = np.linalg.norm(vectors, axis=1)
    check_lengths(lengths, lambda row: f"{batch.where(chosen[row])}, document {batch.ids[chosen[row]]!r}", REMEDY)
    return (vectors / lengths[:, None]).astype(np.float32)


def _refuse_missing(prepared: PreparedCorpus, joined: dict[Split, _JoinedVectors]) -> None:
    missing = {split: np.flatnonzero(~vectors.present) for split, vectors in joined.items()}
    if count := sum(map(len, missing.values())):
        names = [getattr(prepared, split).id(int(row)) for split, rows in missing.items() for row in rows[:4]]
        problem = f"has no vector for {count} of {sum(len(vectors.present) for vectors in joined.values())} documents"
        raise UserError("embed.file", f"{problem}: {shorten(names)}", "give one for each unique and each held-out document")
