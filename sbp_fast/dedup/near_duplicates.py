"""Near-duplicates among shuffled documents: candidates by MinHash, each confirmed by its exact Jaccard similarity.

Two parallel passes over the partitions: the LSH keys of all documents, then the shingles of the candidates. One process holds
16 bytes for each candidate pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sbp_fast.data.holdout import SELECTION_COLUMNS, Decisions, select
from sbp_fast.data.shuffle import ShufflePartition, ShuffleReader
from sbp_fast.dedup.lsh import candidate_pairs
from sbp_fast.dedup.minhash import BANDS, ROWS, SHINGLE_WORDS, band_keys, jaccard, word_ids
from sbp_fast.dedup.shingles import ShingleTable
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.files import atomic_open, save_array
from sbp_fast.pipeline.seals import is_sealed, seal

TRAIN_BIT = np.uint64(1 << 63)  # set in the rank of a document that is not held out
CANDIDATES = "candidates.npy"
SHINGLES = pa.schema({"rank": pa.uint64(), "id": pa.string(), "shingles": pa.large_list(pa.uint64())})


@dataclass(frozen=True)
class DedupTask:
    """One partition of the shuffled documents in `directory`."""

    directory: Path
    index: int
    partition: ShufflePartition

    def file(self, kind: str) -> Path:
        """Return the path of the file of this kind that the task writes."""
        return self.directory / f"{kind}-{self.index:05d}"


@dataclass(frozen=True)
class NearDuplicates:
    """The documents left out, each with the document that it is a near-duplicate of.

    Attributes:
        ranks: uint64 [dropped]; without its top bit a rank is the document's index in the order of reading.
        ids: str [dropped], of the documents left out.
        kept: str [dropped], the id of the document that stays instead of each.
        similarities: float64 [dropped], the Jaccard similarity of the two.
    """

    ranks: np.ndarray
    ids: list[str]
    kept: list[str]
    similarities: np.ndarray

    @property
    def indices(self) -> np.ndarray:
        """Indices of the documents left out, in the order of reading. uint64, sorted."""
        return np.sort(self.ranks & ~TRAIN_BIT)


def find_near_duplicates(
    directory: Path, partitions: Sequence[ShufflePartition], similarity: float, workers: Workers, processes: int
) -> NearDuplicates:
    """Cluster the documents of at least this Jaccard similarity, directly or through others; one of each cluster stays.

    A held-out document stays if there is one, else the document that was read first.
    """
    tasks = [DedupTask(directory, index, partition) for index, partition in enumerate(partitions)]
    for _ in workers.run(_write_keys, tasks, processes):
        pass
    pairs = candidate_pairs([task.file("keys") for task in tasks])
    save_array(directory / CANDIDATES, np.unique(pairs))
    for _ in workers.run(_write_shingles, tasks, processes):
        pass
    return _confirm(_CandidateShingles(tasks), pairs, similarity)


def _distinct_rows(task: DedupTask, names: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
    """Return a partition without exact duplicates, and the ranks of its documents: held-out ones first, then by reading."""
    table = ShuffleReader(task.directory).rows(task.partition, [*SELECTION_COLUMNS, *names])
    columns = {name: table[name].to_numpy() for name in SELECTION_COLUMNS}
    selected = select(columns, Decisions.load(task.directory))
    ranks = columns["index"].copy()
    ranks[selected.train] |= TRAIN_BIT
    rows = np.concatenate([selected.train, selected.heldout])
    return table.select(names).take(rows), ranks[rows]


def _text_buffers(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of large strings, uint8, and where each starts, int64 [strings + 1]."""
    array = pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    if not len(array):
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    _, offsets, text = array.buffers()
    return np.frombuffer(text, np.uint8), np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]


def _write_keys(task: DedupTask) -> None:
    """Write ranks and keys for `candidate_pairs`."""
    path = task.file("keys")
    if is_sealed(path):
        return
    table, ranks = _distinct_rows(task, ["text"])
    keys, words = band_keys(*_text_buffers(table["text"]), SHINGLE_WORDS, BANDS, ROWS)
    save_array(path, np.concatenate([ranks[None], keys])[:, words > 0])
    seal(path)


def _write_shingles(task: DedupTask) -> None:
    """Write the shingles of the partition's candidates, to be memory-mapped."""
    path = task.file("shingles")
    if is_sealed(path):
        return
    table, ranks = _distinct_rows(task, ["id", "text"])
    rows = np.flatnonzero(np.isin(ranks, np.load(task.directory / CANDIDATES)))
    candidates = table.take(rows)
    text, offsets = _text_buffers(candidates["text"])
    words = [word_ids(text[offsets[row] : offsets[row + 1]]) for row in range(len(rows))]
    shingles = ShingleTable.build(words, SHINGLE_WORDS)
    lists = pa.LargeListArray.from_arrays(shingles.offsets, pa.array(shingles.hashes))
    ids = pa.array(candidates["id"].to_pylist(), pa.string())
    with atomic_open(path) as file, pa.ipc.new_file(file, SHINGLES) as writer:
        writer.write_table(pa.table([pa.array(ranks[rows]), ids, lists], schema=SHINGLES))
    seal(path)


class _CandidateShingles:
    """The shingles of all candidates, read as they are asked for.

    Attributes:
        ranks: uint64 [candidates], sorted.
    """

    def __init__(self, tasks: Sequence[DedupTask]) -> None:
        tables = [pa.ipc.open_file(pa.memory_map(str(task.file("shingles")))).read_all() for task in tasks]
        self._lists = pa.concat_tables(tables)["shingles"]
        ranks = np.concatenate([table["rank"].to_numpy() for table in tables])
        self._ids = pa.concat_tables(tables)["id"]
        self._order = np.argsort(ranks)
        self.ranks = ranks[self._order]

    def of(self, candidate: int) -> np.ndarray:
        """Return the shingles of a candidate. uint64, sorted."""
        return self._lists[int(self._order[candidate])].values.to_numpy()

    def id(self, candidate: int) -> str:
        return str(self._ids[int(self._order[candidate])])


def _confirm(shingles: _CandidateShingles, pairs: np.ndarray, similarity: float) -> NearDuplicates:
    if not len(pairs):
        return NearDuplicates(np.zeros(0, np.uint64), [], [], np.zeros(0))
    first, second = np.searchsorted(shingles.ranks, pairs).T.tolist()
    similar = [jaccard(shingles.of(a), shingles.of(b)) >= similarity for a, b in zip(first, second, strict=True)]
    mask, size = np.array(similar, bool), len(shingles.ranks)
    edges = np.ones(int(mask.sum()), bool), (np.array(first)[mask], np.array(second)[mask])
    _, clusters = connected_components(coo_array(edges, shape=(size, size)), directed=False)
    _, kept = np.unique(clusters, return_index=True)  # of each cluster the lowest rank, since candidates are in order of rank
    dropped = np.flatnonzero(kept[clusters] != np.arange(size))
    replaced = list(zip(dropped.tolist(), kept[clusters][dropped].tolist(), strict=True))
    return NearDuplicates(
        shingles.ranks[dropped],
        [shingles.id(candidate) for candidate, _ in replaced],
        [shingles.id(representative) for _, representative in replaced],
        np.array([jaccard(shingles.of(candidate), shingles.of(representative)) for candidate, representative in replaced]),
    )
