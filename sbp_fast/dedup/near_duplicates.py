"""Near-copies among the documents that were laid down: candidates by MinHash, each confirmed by exact Jaccard similarity.

Two passes over the parts in parallel: the keys of all documents, then the shingles of the candidates. What is held in one
place is 16 bytes for a pair of candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sbp_fast.data.holdout import FACTS, Decisions, select
from sbp_fast.data.shuffle import Part, Spill
from sbp_fast.dedup.lsh import candidate_pairs
from sbp_fast.dedup.minhash import BANDS, ROWS, SHINGLE_WORDS, band_keys, jaccard, word_ids
from sbp_fast.dedup.shingles import ShingleTable
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.files import atomic_open, save_array

TRAINED_ON = np.uint64(1 << 63)  # set in the rank of a document that is not held out
WANTED = "candidates.npy"
SHINGLES = pa.schema({"rank": pa.uint64(), "id": pa.string(), "shingles": pa.large_list(pa.uint64())})


@dataclass(frozen=True)
class Task:
    """Part `number` of what was laid down in `directory`."""

    directory: Path
    number: int
    part: Part

    def file(self, kind: str) -> Path:
        return self.directory / f"{kind}-{self.number:05d}"


@dataclass(frozen=True)
class NearCopies:
    """What is left out, and for what.

    Attributes:
        ranks: uint64 [copies]; without its top bit a rank is the document's number in the order of reading.
        ids, kept: str [copies], of the documents left out and of those they are near-copies of.
        similarities: float64 [copies], the Jaccard similarity of the two.
    """

    ranks: np.ndarray
    ids: list[str]
    kept: list[str]
    similarities: np.ndarray

    @property
    def numbers(self) -> np.ndarray:
        """The documents left out, by their number in the order of reading. uint64, sorted."""
        return np.sort(self.ranks & ~TRAINED_ON)


def find_near_copies(directory: Path, parts: Sequence[Part], similarity: float, workers: Workers, processes: int) -> NearCopies:
    """Group the documents whose similarity is at least that, directly or through others; of each group one stays.

    That is one held out, if there is one, else the first that was read.
    """
    tasks = [Task(directory, number, part) for number, part in enumerate(parts)]
    for _ in workers.run(_write_keys, tasks, processes):
        pass
    pairs = candidate_pairs([task.file("keys") for task in tasks])
    save_array(directory / WANTED, np.unique(pairs))
    for _ in workers.run(_write_shingles, tasks, processes):
        pass
    return _confirm(_Shingles(tasks), pairs, similarity)


def _rows(task: Task, names: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
    """The documents of a part that are no exact copies, and their ranks: those held out first, each in order of reading."""
    table = Spill(task.directory).rows(task.part, [*FACTS, *names])
    chosen = select({name: table[name].to_numpy() for name in FACTS}, Decisions.load(task.directory))
    ranks = table["number"].to_numpy().copy()
    ranks[chosen.train] |= TRAINED_ON
    rows = np.concatenate([chosen.train, chosen.heldout])
    return table.select(names).take(rows), ranks[rows]


def _text_buffers(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of large strings, uint8, and where each starts, int64 [strings + 1]."""
    array = pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    if not len(array):
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    _, offsets, text = array.buffers()
    return np.frombuffer(text, np.uint8), np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]


def _write_keys(task: Task) -> None:
    """Write ranks and keys for `candidate_pairs`."""
    path = task.file("keys")
    if path.is_file():
        return
    table, ranks = _rows(task, ["text"])
    keys, words = band_keys(*_text_buffers(table["text"]), SHINGLE_WORDS, BANDS, ROWS)
    save_array(path, np.concatenate([ranks[None], keys])[:, words > 0])


def _write_shingles(task: Task) -> None:
    """Write the shingles of the part's candidates, to be memory-mapped."""
    path = task.file("shingles")
    if path.is_file():
        return
    table, ranks = _rows(task, ["id", "text"])
    rows = np.flatnonzero(np.isin(ranks, np.load(task.directory / WANTED)))
    chosen = table.take(rows)
    text, offsets = _text_buffers(chosen["text"])
    words = [word_ids(text[offsets[row] : offsets[row + 1]]) for row in range(len(rows))]
    shingles = ShingleTable.build(words, SHINGLE_WORDS)
    lists = pa.LargeListArray.from_arrays(shingles.offsets, pa.array(shingles.hashes))
    ids = pa.array(chosen["id"].to_pylist(), pa.string())
    with atomic_open(path) as file, pa.ipc.new_file(file, SHINGLES) as writer:
        writer.write_table(pa.table([pa.array(ranks[rows]), ids, lists], schema=SHINGLES))


class _Shingles:
    """The shingles of candidates, read as they are asked for.

    Attributes:
        ranks: uint64 [candidates], sorted.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        tables = [pa.ipc.open_file(pa.memory_map(str(task.file("shingles")))).read_all() for task in tasks]
        self._lists = pa.concat_tables(tables)["shingles"]
        ranks = np.concatenate([table["rank"].to_numpy() for table in tables])
        self._ids = pa.concat_tables(tables)["id"]
        self._order = np.argsort(ranks)
        self.ranks = ranks[self._order]

    def of(self, candidate: int) -> np.ndarray:
        """The shingles of a candidate, sorted. uint64"""
        return self._lists[int(self._order[candidate])].values.to_numpy()

    def id(self, candidate: int) -> str:
        return str(self._ids[int(self._order[candidate])])


def _confirm(shingles: _Shingles, pairs: np.ndarray, similarity: float) -> NearCopies:
    if not len(pairs):
        return NearCopies(np.zeros(0, np.uint64), [], [], np.zeros(0))
    first, second = np.searchsorted(shingles.ranks, pairs).T.tolist()
    alike = np.array([jaccard(shingles.of(a), shingles.of(b)) >= similarity for a, b in zip(first, second, strict=True)], bool)
    size, linked = len(shingles.ranks), (np.array(first)[alike], np.array(second)[alike])
    links = coo_array((np.ones(int(alike.sum()), bool), linked), shape=(size, size))
    _, groups = connected_components(links, directed=False)
    _, stays = np.unique(groups, return_index=True)  # of each group the lowest rank, since candidates stand by rank
    copies = np.flatnonzero(stays[groups] != np.arange(size))
    found = list(zip(copies.tolist(), stays[groups][copies].tolist(), strict=True))
    return NearCopies(
        shingles.ranks[copies],
        [shingles.id(copy) for copy, _ in found],
        [shingles.id(kept) for _, kept in found],
        np.array([jaccard(shingles.of(copy), shingles.of(kept)) for copy, kept in found]),
    )
