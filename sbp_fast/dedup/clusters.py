"""Documents that say the same: collapsed to one representative before anything is indexed.

Among many copies an index loses other documents, and copies fill each other's neighbour lists (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sbp_fast.dedup.lsh import candidate_pairs
from sbp_fast.dedup.shingles import DocumentShingles, ShingleTable
from sbp_fast.pipeline.files import atomic_path, save_array

BANDS, BAND_SLOTS = 16, 4  # texts of Jaccard similarity 0.8 share a band with probability 1 - (1 - 0.8^4)^16 = 0.9998
COPIES = "copies.parquet"
KINDS = ("exact", "near", "same vector")
NONE = -1


class Copies:
    """Which documents of a corpus were collapsed into which, in turns of ever looser likeness.

    Attributes:
        representative: int64 [documents], the one that stands for each; most stand for themselves.
        kind: int8 [documents], why a document was collapsed, as its place among `KINDS`; `NONE` where it was not.
    """

    def __init__(self, documents: int) -> None:
        self.representative = np.arange(documents)
        self.kind = np.full(documents, NONE, np.int8)

    @property
    def representatives(self) -> np.ndarray:
        """The documents that stand for themselves, int64 ascending."""
        return np.flatnonzero(self.kind == NONE)

    def collapse(self, kind: str, first: np.ndarray) -> None:
        """Collapse some of the present representatives.

        Args:
            first: int64 [representatives], which of them each is to be replaced by; itself where it stays.
        """
        rows = self.representatives
        self.kind[rows[first != np.arange(len(rows))]] = KINDS.index(kind)
        into = np.arange(len(self.representative))
        into[rows] = rows[first]
        self.representative = into[self.representative]

    def counts(self) -> dict[str, int]:
        return {f"{kind.replace(' ', '_')}_copies": int((self.kind == number).sum()) for number, kind in enumerate(KINDS)}

    def write(self, directory: Path) -> None:
        """Write `copies.parquet`: a row for each document that was collapsed."""
        rows = np.flatnonzero(self.kind != NONE)
        kinds = pa.DictionaryArray.from_arrays(self.kind[rows], KINDS).cast(pa.string())
        columns = {"document": rows, "representative": self.representative[rows], "kind": kinds}
        with atomic_path(directory / COPIES) as temporary:
            pq.write_table(pa.table(columns), temporary)


def first_of_equals(rows: Iterable[np.ndarray]) -> np.ndarray:
    """For each of some arrays, the index of the first with the same content. int64 [arrays]."""
    digests = bytearray()
    for row in rows:
        digests += xxhash.xxh3_128_digest(np.ascontiguousarray(row).tobytes())
    high, low = np.frombuffer(digests, "<u8").reshape(-1, 2).T
    order = np.lexsort((low, high))  # equals in the order in which they came
    starts = np.append(True, (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0))[: len(order)]
    first = np.empty_like(order)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def first_of_near_copies(shingles: DocumentShingles, share: float, folder: Path) -> np.ndarray:
    """For each text the first representative that it is a near-copy of, or itself. int64 [texts].

    Two texts are near-copies if each holds at least `share` of the other's shingles. A text is a representative if it is a
    near-copy of none before it, so every other one is a near-copy of its representative itself, not of a chain.

    Candidates are texts that agree in a band of their MinHash signatures (Broder, 1997; Indyk and Motwani, 1998), see
    `candidate_pairs`; all are confirmed by counting shingles.

    Args:
        folder: where the keys of the bands are laid down.
    """
    files, done = [], 0
    for number, table in enumerate(shingles.tables()):
        numbers = np.arange(done, done + len(table), dtype=np.uint64)
        files.append(folder / f"bands-{number:05d}.npy")
        save_array(files[-1], np.concatenate([numbers[None], _bands(table).T]))
        done += len(table)
    first, second = candidate_pairs(files).astype(np.int64).T
    for path in files:
        path.unlink()
    held, holding = shingles.containment(first, second)
    near = np.minimum(held, holding) >= share
    representative = np.arange(len(shingles))
    order = np.lexsort((first[near], second[near]))
    for earlier, later in zip(first[near][order].tolist(), second[near][order].tolist(), strict=True):
        if representative[later] == later and representative[earlier] == earlier:
            representative[later] = earlier
    return representative


def _bands(table: ShingleTable) -> np.ndarray:
    """Each text's signature, `BAND_SLOTS` slots hashed to one key. uint64 [texts, BANDS]."""
    slots = table.signatures(BANDS * BAND_SLOTS).reshape(len(table) * BANDS, BAND_SLOTS)
    weights = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, BAND_SLOTS + 1, dtype=np.uint64)
    return (slots * weights).sum(axis=1).reshape(len(table), BANDS)
