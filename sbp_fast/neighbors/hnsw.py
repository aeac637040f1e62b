"""A hierarchical navigable small world graph (Malkov and Yashunin, 2018) by hnswlib: the index that is saved and queried."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np

from sbp_fast.errors import UserError
from sbp_fast.neighbors.exact import SPARE, concatenate_blocks, growing_budgets
from sbp_fast.neighbors.hnsw_file import check_hnsw_file
from sbp_fast.neighbors.searcher import KnnSearcher
from sbp_fast.neighbors.top_k import rerank
from sbp_fast.pipeline.files import atomic_path, hash_file, read_json, write_json
from sbp_fast.pipeline.progress import Task

INSERT_BLOCK, SEARCH_BLOCK = 1024, 4096
GREATEST_EF_SEARCH = 8192


class HnswIndex:
    """An index of unit vectors under ids of the caller's choice, which can be saved, loaded and searched.

    One thread builds it: with more, hnswlib finds other neighbors at each run. Any number of threads may search.
    """

    def __init__(self, index: hnswlib.Index) -> None:
        self._index = index

    @staticmethod
    def build(
        vectors: np.ndarray, ids: np.ndarray, *, m: int, ef_construction: int, seed: int, task: Task | None = None
    ) -> HnswIndex:
        """Build an index of vectors.

        Args:
            vectors: float32 [documents, dimension], unit norm, no two equal: among many duplicates the graph loses others.
            ids: int64 [documents], not negative.
            m: edges of a node in each layer but the lowest, which has twice as many.
            ef_construction: size of the candidate list while a node is inserted; more is slower and better.
            seed: of the nodes' layers.
            task: advanced by the number of vectors inserted.

        Raises:
            ValueError: two vectors are equal.
        """
        if len(np.unique(vectors.view(f"V{vectors.strides[0]}"))) < len(vectors):
            raise ValueError("equal vectors: remove duplicates before they are indexed")
        index = hnswlib.Index(space="ip", dim=vectors.shape[1])
        index.init_index(max_elements=len(vectors), M=m, ef_construction=ef_construction, random_seed=seed)
        built = HnswIndex(index)
        built.add(vectors, ids, task)
        return built

    def add(self, vectors: np.ndarray, ids: np.ndarray, task: Task | None = None) -> None:
        """Insert more vectors under ids that the index does not have; `m` and `ef_construction` stay as they were built.

        The same loaded index extended by the same vectors is the same at each run.

        Args:
            vectors: float32 [documents, dimension], unit norm, no two equal, and none equal to one in the index.
            ids: int64 [documents], not negative.
            task: advanced by the number of vectors inserted.
        """
        total = len(self) + len(vectors)
        if total > self._index.get_max_elements():
            self._index.resize_index(total)
        for start in range(0, len(vectors), INSERT_BLOCK):
            block = slice(start, start + INSERT_BLOCK)
            self._index.add_items(vectors[block], ids[block], num_threads=1)
            if task is not None:
                task.advance(len(ids[block]))

    def items(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all ids, int64 [block], ascending, with their vectors, float32 [block, dimension], block by block."""
        ids = np.sort(np.array(self._index.get_ids_list(), dtype=np.int64))
        for start in range(0, len(ids), INSERT_BLOCK):
            block = ids[start : start + INSERT_BLOCK]
            yield block, self._index.get_items(block, return_type="numpy")

    def __len__(self) -> int:
        return int(self._index.get_current_count())

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return int(self._index.dim)

    def search(self, queries: np.ndarray, k: int, *, ef_search: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Find about the k nearest documents of each query, nearest first.

        Args:
            queries: float32 [queries, dimension], unit norm.
            k: documents of each query; fewer where the index has fewer.
            ef_search: size of the candidate list during a search; doubled while a search does not reach k documents.
            threads: of the CPU.

        Returns:
            int64 ids and float32 similarities, both [queries, min(k, documents)].

        Raises:
            UserError: the graph is too sparse for any search to reach k documents.
        """
        k = min(k, len(self))
        ef = max(ef_search, k)
        while True:
            self._index.set_ef(ef)
            try:
                ids, distances = self._index.knn_query(queries, k=k, num_threads=threads)
                return ids.astype(np.int64), 1 - distances
            except RuntimeError as error:
                if "contiguous 2D array" not in str(error):  # hnswlib's words for: fewer than k were reached
                    raise
                if ef >= len(self):
                    remedy = "raise pair.hnsw_m or lower pair.neighbors"
                    raise UserError("nearest-neighbor index", f"a search reaches fewer than {k} documents", remedy) from None
                ef *= 2

    def save(self, path: Path) -> None:
        """Write the index, and `NAME.json` beside it with its size and hash, which `load` checks.

        hnswlib's own writer reports neither a full disk nor a missing folder.

        Raises:
            OSError: the index could not be written completely; nothing is left under its name.
        """
        with atomic_path(path) as temporary:
            self._index.save_index(str(temporary))
            written, expected = temporary.stat().st_size, self._index.index_file_size()
            if written != expected:
                raise OSError(errno.ENOSPC, f"only {written} of {expected} bytes were written", str(path))
            digest = hash_file(temporary)
        metadata = {"documents": len(self), "dimension": self.dimension, "bytes": expected, "xxh3": digest}
        write_json(metadata_path(path), metadata)

    @staticmethod
    def load(path: Path) -> HnswIndex:
        """Read an index that `save` wrote.

        Raises:
            UserError: there is no index, or it is damaged, or made so that hnswlib would read out of bounds.
        """
        if not (path.is_file() and metadata_path(path).is_file()):
            raise UserError(path, "there is no index", "rerun pair with pair.save_index=true")
        metadata = read_metadata(path)
        if path.stat().st_size != metadata["bytes"] or hash_file(path) != metadata["xxh3"]:
            raise UserError(path, "damaged since it was written", "rerun the stage that wrote it with --force")
        check_hnsw_file(path, documents=metadata["documents"], dimension=metadata["dimension"])
        index = hnswlib.Index(space="ip", dim=metadata["dimension"])
        index.load_index(str(path))
        return HnswIndex(index)


class HnswSearcher(KnnSearcher):
    """kNN self-join by one query of an index for each document.

    Args:
        vectors: float32 [documents, dimension], unit norm, no two equal.
        ids: int64 [documents], ascending, their ids in `index`.
        m: see `HnswIndex.build`.
        ef_construction: see `HnswIndex.build`.
        ef_search: the least search budget.
        seed: see `HnswIndex.build`.
        threads: of the CPU, for searches.
        task: advanced by the number of documents inserted.

    Attributes:
        index: under `ids`.
        search_budgets: sizes of the candidate list of a search, rising.
    """

    index: HnswIndex

    def __init__(
        self,
        vectors: np.ndarray,
        ids: np.ndarray,
        *,
        m: int,
        ef_construction: int,
        seed: int,
        threads: int,
        ef_search: int = 128,
        task: Task | None = None,
    ) -> None:
        self.vectors, self.ids, self.threads = vectors, ids, threads
        self.index = HnswIndex.build(vectors, ids, m=m, ef_construction=ef_construction, seed=seed, task=task)
        self.search_budgets = growing_budgets(ef_search, max(ef_search, min(len(vectors), GREATEST_EF_SEARCH)))

    def search(
        self, rows: np.ndarray, k: int, search_budget: int = 0, task: Task | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest other vectors of each of the vectors `rows`; see `KnnSearcher.search`.

        Args:
            rows: int64 [rows], indices of vectors.
            k: neighbors of each.
            search_budget: size of the candidate list (ef) of a search.
            task: advanced by the number of rows searched.
        """

        def search_block(start: int) -> tuple[np.ndarray, np.ndarray]:
            own = rows[start : start + SEARCH_BLOCK]
            queries = self.vectors[own]
            ids = self.index.search(queries, k + SPARE, ef_search=search_budget, threads=self.threads)[0]
            return rerank(self.vectors, queries, own, np.searchsorted(self.ids, ids), k)

        return concatenate_blocks(map(search_block, range(0, len(rows), SEARCH_BLOCK)), k, task)


def metadata_path(path: Path) -> Path:
    """Return the path of a saved index's metadata: `documents`, `dimension`, `bytes`, `xxh3`. It is written last."""
    return path.with_name(path.name + ".json")


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a saved index.

    Raises:
        UserError: it is not what `HnswIndex.save` writes.
    """
    metadata = read_json(metadata_path(path))
    sizes = [metadata.get(name) for name in ("documents", "dimension", "bytes")] if isinstance(metadata, dict) else [None]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(metadata_path(path), "is no description of an index", "rerun the stage that wrote it with --force")
    return metadata
