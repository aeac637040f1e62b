"""kNN backends by name: what `pair.backend` may say, what that runs, and what it costs.

Importing this module loads neither torch nor hnswlib; a backend imports what it needs when it is opened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from sbp_fast.config import PairConfig
from sbp_fast.neighbors.searcher import KnnSearcher
from sbp_fast.pipeline.progress import Console
from sbp_fast.registry import Registry

AUTO = "auto"
EXACT_UP_TO = 6000  # documents; with more, ivf takes less time at a pair recall of 0.99 (docs/log.md)

# measured on one core of a server: multiply-adds count as two operations
PRODUCTS_PER_SECOND = 22e9  # operations a second of a self-join by matrix products
HNSW_SECONDS = 1.24e-3  # seconds for which a document of 384 components, among 200,000, keeps hnswlib busy
TYPICAL_NPROBE = 32  # buckets that find 99% of the pairs in the band in most corpora (docs/log.md)


class KnnBackend(ABC):
    """One way to search for nearest neighbors; `BACKENDS.register(name, backend)` makes it available to `pair.backend`.

    Attributes:
        exact: whether every search finds the true neighbors; recall is then not measured.
        uses_device: whether searches run on the configured torch device.
        remedy: what raises the recall of this backend, in the imperative, for the message that the target was missed.
    """

    exact = False
    uses_device = True
    remedy = ""

    @abstractmethod
    def open(
        self,
        vectors: np.ndarray,
        ids: np.ndarray,
        config: PairConfig,
        *,
        seed: int,
        threads: int,
        device: str,
        console: Console,
    ) -> KnnSearcher:
        """Prepare vectors for a search among themselves.

        Args:
            vectors: float32 [documents, dimension], unit norm.
            ids: int64 [documents], ascending: the ids of the documents in a saved index.
            config: settings of the backend.
            seed: of whatever is random.
            threads: of the CPU; the results must not depend on it.
            device: of torch.
            console: shows the progress.
        """

    @abstractmethod
    def core_seconds(self, documents: float, dimension: int) -> float:
        """Return the seconds of one CPU core that each of so many documents takes in a self-join of them."""


BACKENDS: Registry[KnnBackend] = Registry("pair.backend")


def choose_backend(config: PairConfig, documents: int) -> str:
    """Return the name of the backend for a self-join of so many documents; "auto" takes exact for few, ivf for many.

    Raises:
        UserError: `pair.backend` is unknown.
    """
    if config.backend == AUTO:
        return "exact" if documents <= EXACT_UP_TO else "ivf"
    check_backend(config)
    return config.backend


def check_backend(config: PairConfig) -> None:
    """Raise a UserError if `pair.backend` is neither "auto" nor registered."""
    if config.backend != AUTO:
        BACKENDS[config.backend]


class ExactBackend(KnnBackend):
    """All inner products."""

    exact = True

    def open(
        self,
        vectors: np.ndarray,
        ids: np.ndarray,
        config: PairConfig,
        *,
        seed: int,
        threads: int,
        device: str,
        console: Console,
    ) -> KnnSearcher:
        """Prepare vectors; see `KnnBackend.open`."""
        from sbp_fast.neighbors.exact import ExactSearcher

        return ExactSearcher(vectors, threads=threads, device=device)

    def core_seconds(self, documents: float, dimension: int) -> float:
        """Return the time of a product with every document."""
        return 2 * dimension * documents / PRODUCTS_PER_SECOND


class IvfBackend(KnnBackend):
    """Inner products within the k-means buckets of near vectors (an inverted file)."""

    remedy = "raise pair.nprobe"

    def open(
        self,
        vectors: np.ndarray,
        ids: np.ndarray,
        config: PairConfig,
        *,
        seed: int,
        threads: int,
        device: str,
        console: Console,
    ) -> KnnSearcher:
        """Prepare vectors; see `KnnBackend.open`."""
        from sbp_fast.neighbors.ivf import IvfSearcher

        return IvfSearcher(vectors, seed=seed, threads=threads, device=device, nprobe=config.nprobe)

    def core_seconds(self, documents: float, dimension: int) -> float:
        """Return the time of products with all centroids, twice, and with the members of the probed buckets.

        There are as many centroids as a bucket has members: the square root of the documents.
        """
        return 2 * dimension * (2 + TYPICAL_NPROBE) * documents**0.5 / PRODUCTS_PER_SECOND


class HnswBackend(KnnBackend):
    """An hnswlib graph, which is saved beside the pairs."""

    uses_device = False
    remedy = "raise pair.hnsw_m or pair.hnsw_ef_construction"

    def open(
        self,
        vectors: np.ndarray,
        ids: np.ndarray,
        config: PairConfig,
        *,
        seed: int,
        threads: int,
        device: str,
        console: Console,
    ) -> KnnSearcher:
        """Prepare vectors; see `KnnBackend.open`.

        Raises:
            ValueError: two vectors are equal.
        """
        from sbp_fast.neighbors.hnsw import HnswSearcher

        with console.task("documents indexed", len(vectors), "documents") as task:
            return HnswSearcher(
                vectors,
                ids,
                m=config.hnsw_m,
                ef_construction=config.hnsw_ef_construction,
                ef_search=config.hnsw_ef_search,
                seed=seed,
                threads=threads,
                task=task,
            )

    def core_seconds(self, documents: float, dimension: int) -> float:
        """Return the time of inserting and searching one document, whatever the number of documents."""
        return HNSW_SECONDS * dimension / 384


BACKENDS.register("exact", ExactBackend())
BACKENDS.register("ivf", IvfBackend())
BACKENDS.register("hnsw", HnswBackend())
