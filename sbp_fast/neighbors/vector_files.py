"""Vectors made elsewhere, read in batches from files that name documents by their ids.

An array `NAME.npy` of shape [documents, dimension] has its ids, one a line, in `NAME.ids.txt`. In files that have a reader of
records, JSON lines and Parquet first of all, a record has an `id` and a `vector`, a list of numbers.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sbp_fast.data.by_id import read_id, read_records
from sbp_fast.data.input_files import fingerprint_sources
from sbp_fast.data.readers import Fields
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import hash_file, hash_value

FIELDS = Fields("vector", "id", "id")
ARRAY, IDS = ".npy", ".ids.txt"
REMEDY = f"give JSON lines or Parquet with an id and a vector, or NAME{ARRAY} with the ids in NAME{IDS}"
BATCH = 4096  # vectors read at once


@dataclass(frozen=True)
class VectorBatch:
    """Some vectors of a file.

    Attributes:
        ids: of the documents that they are of.
        vectors: float64 [vectors, dimension], as the file has them.
        where: returns the file and the record of one of them, for messages.
    """

    ids: list[str]
    vectors: np.ndarray
    where: Callable[[int], str]


def read_vectors(path: str | tuple[str, ...]) -> Iterator[VectorBatch]:
    """Yield the vectors of files in their order; no more than a batch of them is in memory.

    Args:
        path: files, globs, folders or URLs; arrays are files or globs of this machine.

    Raises:
        UserError: a file that cannot be read, a record without an id or a vector, or vectors of several dimensions.
    """
    dimension, first = 0, ""
    for name in _names(path):
        for batch in _read_array(Path(name)) if name.endswith(ARRAY) else _read_records(name):
            if not first:
                dimension, first = batch.vectors.shape[1], batch.where(0)
            if batch.vectors.shape[1] != dimension:
                problem = f"a vector of {batch.vectors.shape[1]} numbers, where that of {first} has {dimension}"
                raise UserError(batch.where(0), problem, "give vectors of one encoder")
            yield batch


def fingerprint_vectors(path: str | tuple[str, ...]) -> str:
    """Hash the content of files of vectors; where they lie does not matter."""
    return hash_value(
        [
            [hash_file(Path(name)), hash_file(_ids_of(Path(name)))] if name.endswith(ARRAY) else fingerprint_sources(name)
            for name in _names(path)
        ]
    )


def _names(path: str | tuple[str, ...]) -> list[str]:
    """Return the given paths, with a glob of arrays replaced by the arrays that it matches.

    Raises:
        UserError: no array is there, or one without ids.
    """
    names: list[str] = []
    for pattern in (path,) if isinstance(path, str) else path:
        if not pattern.endswith(ARRAY):
            names.append(pattern)
            continue
        matching = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not matching:
            raise UserError(pattern, "no such file", REMEDY)
        for name in matching:
            if not _ids_of(Path(name)).is_file():
                raise UserError(name, f"has no ids beside it: {_ids_of(Path(name))} is missing", "write them there, one a line")
        names += matching
    return names


def _ids_of(array: Path) -> Path:
    return array.with_name(array.name.removesuffix(ARRAY) + IDS)


def _read_array(path: Path) -> Iterator[VectorBatch]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(path, f"is no numpy array: {error}", REMEDY) from None
    if array.ndim != 2 or array.dtype.kind not in "fiu" or not array.shape[1]:
        problem = f"is an array of {array.dtype} of shape {list(array.shape)}, not of numbers [documents, dimension]"
        raise UserError(path, problem, REMEDY)
    ids = _read_ids(_ids_of(path))
    if len(ids) != len(array):
        raise UserError(path, f"holds {len(array)} vectors, and {_ids_of(path).name} {len(ids)} ids", "give one id a vector")
    for start in range(0, len(array), BATCH):
        rows = slice(start, start + BATCH)
        yield VectorBatch(ids[rows], array[rows].astype(np.float64), partial(_row, path, start))


def _row(path: Path, start: int, row: int) -> str:
    return f"{path}, row {start + row}"


def _read_ids(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as file:
            return [line.removesuffix("\n") for line in file]
    except UnicodeDecodeError:
        raise UserError(path, "not UTF-8 text", "convert the file to UTF-8, as with iconv") from None


def _read_records(path: str) -> Iterator[VectorBatch]:
    """Yield batches of records whose vectors have one dimension."""
    stream = read_records(path, FIELDS, REMEDY)
    while records := list(islice(stream, BATCH)):
        ids = [read_id(values, FIELDS.id, where, "a vector without an id", REMEDY) for where, values in records]
        vectors = [_vector(values, where) for where, values in records]
        places = [where for where, _ in records]
        edges = [0, *(row for row in range(1, len(vectors)) if len(vectors[row]) != len(vectors[row - 1])), len(vectors)]
        for start, stop in pairwise(edges):
            yield VectorBatch(ids[start:stop], np.stack(vectors[start:stop]), places[start:stop].__getitem__)


def _vector(values: Mapping[str, Any], where: str) -> np.ndarray:
    value = values.get(FIELDS.text)
    try:
        vector = np.asarray(value)
    except ValueError:
        vector = np.empty(0)
    if not isinstance(value, list) or vector.ndim != 1 or not len(vector) or vector.dtype.kind not in "fiu":
        raise UserError(where, "its vector is no list of numbers", REMEDY)
    return vector.astype(np.float64)
