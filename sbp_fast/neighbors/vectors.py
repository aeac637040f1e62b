"""The vectors that `embed` wrote: shards of any size, memory-mapped, read by row as float32 of unit norm.

Those of the unique documents lie in the stage's directory, those of the held-out documents in its folder `heldout`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.neighbors.top_k import inner_products
from sbp_fast.pipeline.files import save_array
from sbp_fast.pipeline.manifest import Manifest

Storage = Literal["float32", "float16", "int8"]
Split = Literal["unique", "heldout"]
"""Documents of a prepared corpus: the attribute of `PreparedCorpus` that holds them."""
READ_BLOCK = 65_536
MAPPED_FILES = 256


LEAVE_OUT = "leave the document out, or embed with another embed.model or embed.precision"


def check_lengths(lengths: np.ndarray, name: Callable[[int], str], remedy: str = LEAVE_OUT) -> None:
    """Refuse vectors that cannot be brought to unit length: they would be similar to nothing, or compare false with all.

    Args:
        lengths: float [vectors], not finite where a component is not.
        name: returns the document that a vector is of, for the message.
        remedy: what to do about it.

    Raises:
        UserError: a length is 0 or not finite; the message names the document.
    """
    unusable = ~(np.isfinite(lengths) & (lengths > 0))
    if unusable.any():
        row = int(np.argmax(unusable))
        problem = f"its vector has the length {lengths[row]:g}"
        raise UserError(name(row), problem, remedy)


class Vectors:
    """The vectors of one split from a finished `embed` stage, in the order of its corpus; only the requested rows are read.

    Args:
        directory: the stage's output.
        rows: int64, the rows of this view, in its order; all of them if left out.
        hashed: whether to hash the files; false where that was done for all processes of a stage.
        split: the documents that the vectors are of.
        corpus: these documents, which messages then name by their ids.

    Raises:
        UserError: no finished `embed` stage, or a damaged one; it has no vectors of the split. Reading a vector that is not
            finite or has the length 0 raises one, too.
    """

    def __init__(
        self,
        directory: str | Path,
        rows: np.ndarray | None = None,
        *,
        hashed: bool = True,
        split: Split = "unique",
        corpus: Corpus | None = None,
    ) -> None:
        self.directory, self.split, self.corpus = Path(directory), split, corpus
        self.manifest = Manifest.load(self.directory, "embed", hashed=hashed)
        files = sorted(shard_folder(self.directory, split).glob("vectors-*.npy"))
        if not files:
            raise UserError(self.directory, f"has no vectors of {split} documents", "run embed again with --force")
        # A map holds a file descriptor, of which a process often has 1,024.
        self._shard = lru_cache(MAPPED_FILES)(lambda number: np.load(files[number], mmap_mode="r"))
        shapes = [self._shard(number).shape for number in range(len(files))]
        self._ends = np.cumsum([rows for rows, _ in shapes])
        self._rows = np.arange(self._ends[-1]) if rows is None else rows
        self.dimension: int = shapes[0][1]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Return float32 [indices, dimension], unit norm; dividing by the length removes the scale of the storage."""
        rows = self._rows[indices]
        vectors = np.empty((len(rows), self.dimension), dtype=np.float32)
        order = np.argsort(rows, kind="stable")  # shard by shard, each read in its order
        ends = np.searchsorted(rows[order], self._ends)
        starts = np.concatenate([[0], ends[:-1]])
        for shard in np.flatnonzero(ends > starts).tolist():
            part, first = order[starts[shard] : ends[shard]], self._ends[shard - 1] if shard else 0
            vectors[part] = self._shard(shard)[rows[part] - first]
        lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
        check_lengths(lengths, lambda index: self._name(int(rows[index])))
        vectors /= lengths[:, None]
        return vectors

    def _name(self, row: int) -> str:
        document = f"{self.split} document {row if self.corpus is None else self.corpus.id(row)}"
        return f"{self.directory}, {document}"

    def select(self, indices: np.ndarray) -> Vectors:
        """Return a view of some of these vectors."""
        view = object.__new__(Vectors)
        view.__dict__ |= self.__dict__ | {"_rows": self._rows[indices]}
        return view


def shard_folder(directory: Path, split: Split) -> Path:
    """Return the folder of a split's shards within the directory of `embed`."""
    return directory if split == "unique" else directory / split


def write_vectors(path: Path, vectors: np.ndarray, storage: Storage) -> None:
    """Write one shard, atomically.

    Args:
        path: of the shard.
        vectors: float32 [documents, dimension], unit norm.
        storage: number format; int8 scales each vector so that its greatest component is 127.
    """
    if storage == "int8":
        greatest = np.abs(vectors).max(axis=1, keepdims=True)
        vectors = np.rint(vectors * (127 / np.maximum(greatest, 1e-12)))
    save_array(path, vectors.astype(storage))


def similarities(vectors: Vectors, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the inner product of each pair of rows, float32 [pairs]: the bits that a self-join finds in either direction."""
    scores = np.empty(len(first), dtype=np.float32)
    for start in range(0, len(first), READ_BLOCK):
        part = slice(start, start + READ_BLOCK)
        rows = np.arange(len(first[part]))
        scores[part] = inner_products(vectors[first[part]], rows, vectors[second[part]], rows)
    return scores
