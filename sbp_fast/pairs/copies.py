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

from sbp_fast.corpus.shingles import DocumentShingles, ShingleTable
from sbp_fast.files import atomic_path

BANDS, BAND_SLOTS = 16, 4  # texts of Jaccard similarity 0.8 share a band with probability 1 - (1 - 0.8^4)^16 = 0.9998
COPIES = "copies.parquet"
KINDS = ("exact", "near", "same vector")


class Copies:
    """Which documents of a corpus were collapsed into which, in turns of ever looser likeness.

    Attributes:
        representative: int64 [documents], the one that stands for each; most stand for themselves.
        kind: str [documents], why a document was collapsed; empty where it was not.
    """

    def __init__(self, documents: int) -> None:
        self.representative = np.arange(documents)
        self.kind = np.full(documents, "", dtype="<U16")

    @property
    def representatives(self) -> np.ndarray:
        """The documents that stand for themselves, int64 ascending."""
        return np.flatnonzero(self.kind == "")

    def collapse(self, kind: str, first: np.ndarray) -> None:
        """Collapse some of the present representatives.

        Args:
            first: int64 [representatives], which of them each is to be replaced by; itself where it stays.
        """
        rows = self.representatives
        self.kind[rows[first != np.arange(len(rows))]] = kind
        into = np.arange(len(self.representative))
        into[rows] = rows[first]
        self.representative = into[self.representative]

    def counts(self) -> dict[str, int]:
        return {f"{kind.replace(' ', '_')}_copies": int((self.kind == kind).sum()) for kind in KINDS}

    def write(self, directory: Path) -> None:
        """Write `copies.parquet`: a row for each document that was collapsed."""
        rows = np.flatnonzero(self.kind != "")
        columns = {"document": rows, "representative": self.representative[rows], "kind": self.kind[rows].tolist()}
        with atomic_path(directory / COPIES) as temporary:
            pq.write_table(pa.table(columns), temporary)


def first_of_equals(rows: Iterable[np.ndarray]) -> np.ndarray:
    """For each of some arrays, the index of the first with the same content. int64 [arrays]."""
    seen: dict[bytes, int] = {}
    digests = (xxhash.xxh3_128_digest(np.ascontiguousarray(row).tobytes()) for row in rows)
    return np.array([seen.setdefault(digest, row) for row, digest in enumerate(digests)], dtype=np.int64)


def first_of_near_copies(shingles: DocumentShingles, share: float) -> np.ndarray:
    """For each text the first representative that it is a near-copy of, or itself. int64 [texts].

    Two texts are near-copies if each holds at least `share` of the other's shingles. A text is a representative if it is a
    near-copy of none before it, so every other one is a near-copy of its representative itself, not of a chain.

    Candidates are texts that agree in a band of their MinHash signatures (Broder, 1997; Indyk and Motwani, 1998) with the
    first text that has it, which keeps them linear in the number of texts; all are confirmed by counting shingles.
    """
    first, second = _band_candidates(np.concatenate([_bands(table) for table in shingles.tables()]))
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


def _band_candidates(bands: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs, first < second, of which the first is the earliest text with one of the second's bands."""
    texts = len(bands)
    keys = [np.zeros(0, dtype=np.int64)]
    for band in bands.T:
        _, earliest, group = np.unique(band, return_index=True, return_inverse=True)
        keys.append(earliest[group] * texts + np.arange(texts))
    pairs = np.unique(np.concatenate(keys))
    first, second = pairs // max(texts, 1), pairs % max(texts, 1)
    return first[first < second], second[first < second]
