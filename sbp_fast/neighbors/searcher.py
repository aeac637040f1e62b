"""The interface of vectors that are ready to be searched for nearest neighbors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sbp_fast.pipeline.progress import Task

if TYPE_CHECKING:
    from sbp_fast.neighbors.hnsw import HnswIndex


class KnnSearcher(ABC):
    """Vectors that are ready to be searched for the nearest neighbors of some of themselves.

    Attributes:
        search_budgets: values that `search` accepts as its budget, in the order of rising cost and recall; none where the
            search is exact.
        index: what can be saved and queried later, if the search used such an index.
    """

    search_budgets: Sequence[int] = ()
    index: HnswIndex | None = None

    @abstractmethod
    def search(
        self, rows: np.ndarray, k: int, search_budget: int = 0, task: Task | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest other vectors of each of the vectors `rows`.

        Args:
            rows: int64 [rows], indices of vectors.
            k: neighbors of each.
            search_budget: one of `search_budgets`; ignored where the search is exact.
            task: advanced by the number of rows searched.

        Returns:
            int64 indices and float32 inner products, both [rows, k], greatest first; -1 and -inf where there are fewer.
        """
