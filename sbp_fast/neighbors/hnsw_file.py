"""The file of an hnswlib index, checked before hnswlib reads it: hnswlib follows every number in it, out of bounds, too.

header      offset of level 0, capacity, elements, bytes of an element, offsets of its id and vector, highest level, entry,
edges in upper levels, edges in level 0, M, 1 / ln(M), ef_construction
level 0     for each element: number of edges, edges (uint32), vector (float32), id (uint64)
levels      for each element: bytes (uint32), then for each upper level that it is in: number of edges, edges
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from sbp_fast.errors import UserError

HEADER = np.dtype(
    [
        *((name, "<u8") for name in ("level0", "capacity", "elements", "element_bytes", "id_offset", "vector_offset")),
        ("highest_level", "<i4"),
        ("entry", "<u4"),
        *((name, "<u8") for name in ("upper_edges", "level0_edges", "m")),
        ("multiplier", "<f8"),
        ("ef_construction", "<u8"),
    ]
)
GREATEST_M, GREATEST_EF_CONSTRUCTION = 10_000, 1 << 20


def check_hnsw_file(path: Path, *, documents: int, dimension: int) -> None:
    """Check that every number in the file of an index is one that hnswlib could have written.

    Args:
        path: of the file.
        documents: number of vectors in the index.
        dimension: components of a vector.

    Raises:
        UserError: one is not; the message says which.
    """
    content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    try:
        _check(content, documents, dimension)
    except (ValueError, OverflowError) as error:
        raise UserError(path, f"is no index that sbp-fast wrote: {error}", "rerun its stage with --force") from None


def _check(content: np.ndarray, documents: int, dimension: int) -> None:
    if len(content) < HEADER.itemsize:
        raise ValueError("it has no header")
    header = content[: HEADER.itemsize].view(HEADER)[0]
    m, vector_offset = int(header["m"]), 8 * int(header["m"]) + 4
    expected = {
        "level0": 0,
        "capacity": documents,
        "elements": documents,
        "vector_offset": vector_offset,
        "id_offset": vector_offset + 4 * dimension,
        "element_bytes": vector_offset + 4 * dimension + 8,
        "upper_edges": m,
        "level0_edges": 2 * m,
    }
    for name, value in expected.items():
        _require(header[name] == value, f"{name} in its header is {header[name]}, not {value}")
    _require(2 <= m <= GREATEST_M, f"M in its header is {m}")
    _require(math.isclose(header["multiplier"], 1 / math.log(m)), "the multiplier in its header does not belong to M")
    _require(1 <= header["ef_construction"] <= GREATEST_EF_CONSTRUCTION, "ef_construction in its header is out of range")
    end = HEADER.itemsize + documents * expected["element_bytes"]
    _require(end <= len(content) and (len(content) - end) % 4 == 0, "it is too short")
    element = np.dtype([("count", "<u4"), ("edges", "<u4", (2 * m,)), ("vector", "<f4", (dimension,)), ("id", "<u8")])
    elements = content[HEADER.itemsize : end].view(element)
    _check_edges(elements["count"], elements["edges"], np.ones(documents, bool))
    _require(np.isfinite(elements["vector"]).all(), "a vector is not finite")
    _require((elements["id"] < 1 << 63).all() and len(np.unique(elements["id"])) == documents, "its ids are not unique")
    levels = _check_upper_levels(content[end:].view("<u4"), documents, m)
    highest, entry = int(header["highest_level"]), int(header["entry"])
    if documents:
        _require(entry < documents and levels[entry] == highest == levels.max(), "its entry is not in the highest level")


def _check_upper_levels(words: np.ndarray, documents: int, m: int) -> np.ndarray:
    """Check the edges of the upper levels; return the highest level of each element."""
    levels, starts, position, numbers = np.zeros(documents, np.int64), np.zeros(documents, np.int64), 0, words.tolist()
    for number in range(documents):
        _require(position < len(numbers), "its upper levels are too short")
        levels[number], rest = divmod(numbers[position], 4 * (m + 1))
        _require(not rest, "an upper level has no whole number of edges")
        starts[number] = position + 1
        position += 1 + int(levels[number]) * (m + 1)
    _require(position == len(numbers), "its upper levels have another length")
    for level in range(1, int(levels.max(initial=0)) + 1):
        members = np.flatnonzero(levels >= level)
        lists = words[(starts[members] + (level - 1) * (m + 1))[:, None] + np.arange(m + 1)]
        _check_edges(lists[:, 0], lists[:, 1:], levels >= level)
    return levels


def _check_edges(counts: np.ndarray, edges: np.ndarray, is_in_level: np.ndarray) -> None:
    """Check that the first `counts` edges of each row lead to elements of the level."""
    _require((counts <= edges.shape[1]).all(), "an element has more edges than there is room for")
    used = edges[np.arange(edges.shape[1]) < counts[:, None]]
    _require((used < len(is_in_level)).all() and is_in_level[used].all(), "an edge leads out of its level")


def _require(condition: object, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
