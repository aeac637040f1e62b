"""Clusters of duplicate documents, each with one representative, found before anything is indexed.

Among many duplicates an index loses other documents, and duplicates fill each other's neighbor lists (docs/log.md).
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
DUPLICATES = "duplicates.parquet"
KINDS = ("exact", "near", "same vector")
NONE = -1


class DuplicateClusters:
    """The clusters of duplicates in a corpus, merged kind by kind of ever looser similarity.

    Attributes:
        representative: int64 [documents], the document that stands for each; itself for most.
        kind: int8 [documents], the index in `KINDS` of the reason why another document stands for it; `NONE` where none does.
    """

    def __init__(self, documents: int) -> None:
        self.representative = np.arange(documents)
        self.kind = np.full(documents, NONE, np.int8)

    @property
    def representatives(self) -> np.ndarray:
        """Documents that stand for themselves. int64, ascending."""
        return np.flatnonzero(self.kind == NONE)

    def merge(self, kind: str, first: np.ndarray) -> None:
        """Merge the clusters of some of the present representatives.

        Args:
            kind: why, one of `KINDS`.
            first: int64 [representatives], the position among them of the one that replaces each; its own where it stays.
        """
        rows = self.representatives
        self.kind[rows[first != np.arange(len(rows))]] = KINDS.index(kind)
        into = np.arange(len(self.representative))
        into[rows] = rows[first]
        self.representative = into[self.representative]

    def counts(self) -> dict[str, int]:
        """Return the number of documents replaced for each reason, such as "exact_duplicates"."""
        return {f"{kind.replace(' ', '_')}_duplicates": int((self.kind == index).sum()) for index, kind in enumerate(KINDS)}

    def write(self, directory: Path) -> None:
        """Write `duplicates.parquet`: a row for each document that another one stands for."""
        rows = np.flatnonzero(self.kind != NONE)
        kinds = pa.DictionaryArray.from_arrays(self.kind[rows], KINDS).cast(pa.string())
        columns = {"document": rows, "representative": self.representative[rows], "kind": kinds}
        with atomic_path(directory / DUPLICATES) as temporary:
            pq.write_table(pa.table(columns), temporary)


def first_of_equals(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Return for each array the index of the first with the same content. int64 [arrays]."""
    digests = bytearray()
    for row in rows:
        digests += xxhash.xxh3_128_digest(np.ascontiguousarray(row).tobytes())
    high, low = np.frombuffer(digests, "<u8").reshape(-1, 2).T
    order = np.lexsort((low, high))  # equal arrays keep their order
    starts = np.append(True, (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0))[: len(order)]
    first = np.empty_like(order)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def first_of_near_duplicates(shingles: DocumentShingles, share: float, folder: Path) -> np.ndarray:
    """Return for each text the first representative that it is a near-duplicate of, or itself. int64 [texts].

    Two texts are near-duplicates if each holds at least `share` of the other's shingles. A text is a representative if it is a
    near-duplicate of none before it, so every other text is a near-duplicate of its representative, not of a chain.

    Candidates are texts that agree in a band of their MinHash signatures (Broder, 1997; Indyk and Motwani, 1998), see
    `candidate_pairs`; all are confirmed by counting shingles.

    Args:
        shingles: of the texts.
        share: from 0 to 1.
        folder: for files of band keys, which are removed.
    """
    files, first_text = [], 0
    for index, table in enumerate(shingles.tables()):
        texts = np.arange(first_text, first_text + len(table), dtype=np.uint64)
        files.append(folder / f"bands-{index:05d}.npy")
        save_array(files[-1], np.concatenate([texts[None], _band_keys(table).T]))
        first_text += len(table)
    first, second = candidate_pairs(files).astype(np.int64).T
    for path in files:
        path.unlink()
    near = np.minimum(*shingles.containment(first, second)) >= share
    representative = np.arange(len(shingles))
    order = np.lexsort((first[near], second[near]))
    for earlier, later in zip(first[near][order].tolist(), second[near][order].tolist(), strict=True):
        if representative[later] == later and representative[earlier] == earlier:
            representative[later] = earlier
    return representative


def _band_keys(table: ShingleTable) -> np.ndarray:
    """Hash every `BAND_SLOTS` slots of each text's signature to one key. uint64 [texts, BANDS]."""
    slots = table.signatures(BANDS * BAND_SLOTS).reshape(len(table) * BANDS, BAND_SLOTS)
    weights = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, BAND_SLOTS + 1, dtype=np.uint64)
    return (slots * weights).sum(axis=1).reshape(len(table), BANDS)
