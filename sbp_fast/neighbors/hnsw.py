"""A hierarchical navigable small world graph (Malkov and Yashunin, 2018) from hnswlib: the index that users keep and ask."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import hnswlib
import numpy as np

from sbp_fast.errors import UserError
from sbp_fast.neighbors.exact import SPARE, collect, growing
from sbp_fast.neighbors.top_k import rank
from sbp_fast.pipeline.files import atomic_path, hash_file, read_json, write_json
from sbp_fast.pipeline.progress import Task

INSERT_BLOCK, SEARCH_BLOCK = 1024, 4096
WIDEST_SEARCH = 8192


class HnswIndex:
    """An index over unit vectors under ids of the caller's choice, which can be saved, loaded and asked.

    It is built by one thread: with more, hnswlib gives other neighbours at each run. Any number may ask.
    """

    def __init__(self, index: hnswlib.Index) -> None:
        self._index = index

    @staticmethod
    def build(
        vectors: np.ndarray, ids: np.ndarray, *, links: int, construction: int, seed: int, task: Task | None = None
    ) -> HnswIndex:
        """Put `vectors` in under `ids`.

        Args:
            vectors: float32 [documents, dimension], unit norm, no two equal: among many copies the graph loses others.
            ids: int64 [documents], not negative.
            links: edges of a node in each layer but the lowest, which has twice as many.
            construction: candidates held while a node is inserted; more is slower and better.
            seed: draws the nodes' layers.

        Raises:
            ValueError: two vectors are equal.
        """
        if len(np.unique(vectors.view(f"V{vectors.strides[0]}"))) < len(vectors):
            raise ValueError("equal vectors: collapse copies before they are indexed")
        index = hnswlib.Index(space="ip", dim=vectors.shape[1])
        index.init_index(max_elements=len(vectors), M=links, ef_construction=construction, random_seed=seed)
        built = HnswIndex(index)
        built.add(vectors, ids, task)
        return built

    def add(self, vectors: np.ndarray, ids: np.ndarray, task: Task | None = None) -> None:
        """Put more `vectors` in under `ids`, none of which the index has; links and construction stay as it was built with.

        What one loaded index becomes by it is the same at each run.

        Args:
            vectors: float32 [documents, dimension], unit norm, no two equal, and none equal to one that the index has.
        """
        whole = len(self) + len(vectors)
        if whole > self._index.get_max_elements():
            self._index.resize_index(whole)
        for start in range(0, len(vectors), INSERT_BLOCK):
            block = slice(start, start + INSERT_BLOCK)
            self._index.add_items(vectors[block], ids[block], num_threads=1)
            if task is not None:
                task.advance(len(ids[block]))

    def items(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All that it has, a block at a time: ids int64 [n], ascending, and vectors as they came, float32 [n, dimension]."""
        ids = np.sort(np.array(self._index.get_ids_list(), dtype=np.int64))
        for start in range(0, len(ids), INSERT_BLOCK):
            block = ids[start : start + INSERT_BLOCK]
            yield block, self._index.get_items(block, return_type="numpy")

    def __len__(self) -> int:
        return int(self._index.get_current_count())

    @property
    def dimension(self) -> int:
        return int(self._index.dim)

    def ask(self, queries: np.ndarray, k: int, *, search: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """About the k nearest of each query, nearest first: ids int64 and similarities float32, [queries, min(k, documents)].

        Args:
            queries: float32 [queries, dimension], unit norm.
            search: candidates held during a search; doubled while a search does not reach k documents.

        Raises:
            UserError: the graph is too sparse for any search to reach k documents.
        """
        k = min(k, len(self))
        width = max(search, k)
        while True:
            self._index.set_ef(width)
            try:
                ids, distances = self._index.knn_query(queries, k=k, num_threads=threads)
                return ids.astype(np.int64), 1 - distances
            except RuntimeError as error:
                if "contiguous 2D array" not in str(error):  # hnswlib's words for: fewer than k were reached
                    raise
                if width >= len(self):
                    remedy = "raise pair.hnsw_links or lower pair.neighbours"
                    raise UserError("nearest-neighbour index", f"a search reaches fewer than {k} documents", remedy) from None
                width *= 2

    def save(self, path: Path) -> None:
        """Write the index, and `NAME.json` beside it with its size and hash, which `load` checks.

        hnswlib's own writer reports neither a full disk nor a missing folder.

        Raises:
            OSError: the index could not be written whole; nothing is left under its name.
        """
        with atomic_path(path) as temporary:
            self._index.save_index(str(temporary))
            written, whole = temporary.stat().st_size, self._index.index_file_size()
            if written != whole:
                raise OSError(errno.ENOSPC, f"only {written} of {whole} bytes were written", str(path))
            digest = hash_file(temporary)
        facts = {"documents": len(self), "dimension": self.dimension, "bytes": whole, "xxh3": digest}
        write_json(facts_path(path), facts)

    @staticmethod
    def load(path: Path) -> HnswIndex:
        """Read what `save` wrote.

        Raises:
            UserError: no index, or one that is damaged.
        """
        if not (path.is_file() and facts_path(path).is_file()):
            raise UserError(path, "no index lies here", "rerun pair with pair.keep_index=true")
        facts = read_json(facts_path(path))
        if path.stat().st_size != facts["bytes"] or hash_file(path) != facts["xxh3"]:
            raise UserError(path, "damaged since it was written", "rerun the stage that wrote it with --force")
        index = hnswlib.Index(space="ip", dim=facts["dimension"])
        index.load_index(str(path))
        return HnswIndex(index)


class HnswJoin:
    """The self-join by asking an index once a document.

    Args:
        vectors: float32 [documents, dimension], unit norm, no two equal.
        ids: int64 [documents], ascending, what `index` shall call them.

    Attributes:
        index: over `ids`.
        efforts: widths of the search, rising.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        ids: np.ndarray,
        *,
        links: int,
        construction: int,
        seed: int,
        threads: int,
        first_effort: int = 128,
        task: Task | None = None,
    ) -> None:
        self.vectors, self.ids, self.threads = vectors, ids, threads
        self.index = HnswIndex.build(vectors, ids, links=links, construction=construction, seed=seed, task=task)
        self.efforts = tuple(growing(first_effort, max(first_effort, min(len(vectors), WIDEST_SEARCH))))

    def search(self, rows: np.ndarray, k: int, effort: int, task: Task | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k other members nearest to each of the members `rows`: ids int64 and products float32, [rows, k].

        Args:
            effort: width of the search.
        """

        def work(start: int) -> tuple[np.ndarray, np.ndarray]:
            own = rows[start : start + SEARCH_BLOCK]
            queries = self.vectors[own]
            found = np.searchsorted(self.ids, self.index.ask(queries, k + SPARE, search=effort, threads=self.threads)[0])
            return rank(self.vectors, queries, own, found, k)

        return collect(map(work, range(0, len(rows), SEARCH_BLOCK)), k, task)


def facts_path(path: Path) -> Path:
    """Where the facts of an index lie that `save` wrote: `documents`, `dimension`, `bytes`, `xxh3`. They come last."""
    return path.with_name(path.name + ".json")
