"""Extension of a saved index by the documents of another corpus; the index itself stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sbp_fast.config import RunConfig
from sbp_fast.config.files import diff_config
from sbp_fast.errors import UserError
from sbp_fast.neighbors.hnsw import HnswIndex, metadata_path
from sbp_fast.neighbors.saved_index import INDEX, IndexedCorpus, SavedIndex, embedding_of, index_path, write_members
from sbp_fast.neighbors.vectors import READ_BLOCK, Vectors
from sbp_fast.pipeline.files import atomic_path, link
from sbp_fast.pipeline.progress import Console, Task
from sbp_fast.pipeline.seals import is_sealed, seal

LEFT_OUT = "left-out.parquet"
COMPARABLE = {"model", "maximum_tokens", "prompt", "dimensions"}  # settings of `embed` that two vectors must share


def check_extension(saved: SavedIndex, vectors: Vectors, corpus: Path, fingerprint: str) -> None:
    """Refuse vectors that cannot extend an index.

    Args:
        saved: the index to extend.
        vectors: of the documents to add.
        corpus: output of `prepare` that they are in.
        fingerprint: of that output.

    Raises:
        UserError: the corpus is in the index already; vectors of another corpus, or embedded with other settings.
    """
    if fingerprint in (indexed.corpus for indexed in saved.corpora):
        raise UserError(corpus, f"is already in the index in {saved.directory}", "give another --corpus")
    if vectors.manifest.inputs["corpus"] != fingerprint:
        raise UserError(vectors.directory, f"not the vectors of {corpus}", "run embed on this corpus first")
    old, new = (settings.model_dump(include=COMPARABLE) for settings in (saved.embedding, embedding_of(vectors)))
    changes = diff_config(old, new, "embed.")
    if vectors.dimension != saved.dimension:
        changes.append(f"dimension of the vectors: {saved.dimension} -> {vectors.dimension}")
    if changes:
        problem = f"not embedded as those of the index in {saved.directory}: {'; '.join(changes)}"
        raise UserError(vectors.directory, problem, "embed the corpus with the same settings")


def extend_index(
    config: RunConfig,
    saved: SavedIndex,
    vectors: Vectors,
    directory: Path,
    *,
    console: Console,
    checkpoint: Callable[[], object],
) -> dict[str, Any]:
    """Write a saved index extended by vectors, partition by partition; finished ones are not written again.

    Args:
        config: `pair.partition_documents`, and for new partitions `pair.hnsw_m`, `pair.hnsw_ef_construction` and `seed`.
        saved: the index to extend.
        vectors: of all documents to add (see `check_extension`).
        directory: for `index/`, `members.json` and `left-out.parquet`.
        console: shows the progress.
        checkpoint: called after each partition.

    Returns:
        Counts for the manifest.
    """
    last = saved.corpora[-1]
    corpus = IndexedCorpus.of(vectors, first=last.first + last.documents)
    left_out = _left_out(saved, vectors, corpus.first, directory)
    rows = np.setdiff1d(np.arange(len(vectors)), left_out)
    added = distribute(saved.partition_documents, len(rows), config.pair.partition_documents)
    console.say(f"{len(rows)} documents to add, {len(left_out)} left out as duplicates by vector")
    (directory / INDEX).mkdir(exist_ok=True)
    ends = np.cumsum(added)
    parts = [rows[end - count : end] for end, count in zip(ends, added, strict=True)]
    numbers = range(len(added))
    missing = [number for number in numbers if not is_sealed(index_path(directory, number))]
    done = len(rows) - sum(added[number] for number in missing)
    with console.task("documents indexed", len(rows), "documents", done=done) as task:
        for number in missing:
            ids = corpus.first + parts[number]
            _write_partition(config, saved, number, vectors[parts[number]], ids, directory, task)
            seal(index_path(directory, number), metadata_path(index_path(directory, number)))
            checkpoint()
    write_members(directory, [*saved.corpora, corpus], saved.embedding)
    before = [*saved.partition_documents, *[0] * (len(added) - len(saved.partitions))]
    return {
        "documents": corpus.first + corpus.documents,
        "added": len(rows),
        "left_out": len(left_out),
        "partitions": [old + new for old, new in zip(before, added, strict=True)],
    }


def _left_out(saved: SavedIndex, vectors: Vectors, first: int, directory: Path) -> np.ndarray:
    """Return the documents that are not added, int64 ascending; written, so that a killed run need not search again."""
    path = directory / LEFT_OUT
    if not is_sealed(path):
        rows, ids = equal_vectors(vectors, first, map(HnswIndex.load, saved.partitions))
        with atomic_path(path) as temporary:
            pq.write_table(pa.table({"document": rows, "equal": ids}), temporary)
        seal(path)
    return pq.read_table(path)["document"].to_numpy()


def equal_vectors(vectors: Vectors, first: int, indexes: Iterable[HnswIndex]) -> tuple[np.ndarray, np.ndarray]:
    """Find the vectors that equal one in an index, or an earlier one among themselves, to the bit.

    Args:
        vectors: to compare.
        first: id of the first vector; the ids of the others follow it, and those in the indexes are lower.
        indexes: to compare with.

    Returns:
        Rows of the equal vectors, int64 ascending, and the lowest id with the same vector, int64.
    """
    digests = [digest for start in range(0, len(vectors), READ_BLOCK) for digest in _digests(_block(vectors, start))]
    lowest: dict[bytes, int] = {}
    for row, digest in enumerate(digests):
        lowest.setdefault(digest, first + row)
    for index in indexes:
        for ids, block in index.items():
            for id, digest in zip(ids.tolist(), _digests(block), strict=True):
                if digest in lowest:
                    lowest[digest] = min(id, lowest[digest])
    equal = np.array([lowest[digest] for digest in digests], dtype=np.int64)
    rows = np.flatnonzero(equal != first + np.arange(len(digests)))
    return rows, equal[rows]


def _block(vectors: Vectors, start: int) -> np.ndarray:
    return vectors[np.arange(start, min(start + READ_BLOCK, len(vectors)))]


def _digests(block: np.ndarray) -> Iterator[bytes]:
    return (xxhash.xxh3_128_digest(row.data) for row in block)


def distribute(sizes: Sequence[int], documents: int, capacity: int) -> list[int]:
    """Distribute documents over partitions: the smallest are filled first, then new ones are begun.

    Args:
        sizes: documents in each partition.
        documents: to distribute.
        capacity: documents of a partition at most; one that has more receives none.

    Returns:
        The documents that each partition receives, the new partitions last.
    """
    added = [0] * len(sizes)
    for number in np.argsort(sizes, kind="stable").tolist():
        added[number] = min(max(capacity - sizes[number], 0), documents)
        documents -= added[number]
    return added + [min(capacity, documents - start) for start in range(0, documents, capacity)]


def _write_partition(
    config: RunConfig, saved: SavedIndex, number: int, vectors: np.ndarray, ids: np.ndarray, directory: Path, task: Task
) -> None:
    path, settings = index_path(directory, number), config.pair
    if number >= len(saved.partitions):
        m, ef_construction = settings.hnsw_m, settings.hnsw_ef_construction
        HnswIndex.build(vectors, ids, m=m, ef_construction=ef_construction, seed=config.seed, task=task).save(path)
    elif len(ids):
        index = HnswIndex.load(saved.partitions[number])
        index.add(vectors, ids, task)
        index.save(path)
    else:
        source = saved.partitions[number]
        link(source, path)
        link(metadata_path(source), metadata_path(path))
