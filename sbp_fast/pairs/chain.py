"""A path through related documents, as In-Context Pretraining orders a corpus (Shi et al. 2024, arXiv 2310.10638)."""

from __future__ import annotations

import numpy as np
from numba import njit


def related_order(documents: int, seeds: np.ndarray, partners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all documents in an order in which related ones follow each other, and where a new path begins.

    The greedy path of Shi et al. (2024, section 2.2): begin with the document of the fewest partners that was not visited, go
    to its most similar partner that was not, and so on; where there is none, begin again.

    Args:
        documents: number of documents.
        seeds: int64 [pairs], sorted.
        partners: int64 [pairs], of each seed the most similar first.

    Returns:
        int64 [documents], each document once, and bool [documents], whether the document begins a path.
    """
    starts = np.searchsorted(seeds, np.arange(documents + 1))
    by_degree = np.argsort(np.diff(starts), kind="stable")
    return _walk(by_degree, starts.astype(np.int64), partners.astype(np.int64))


@njit(cache=True)
def _walk(by_degree, starts, partners):  # type: ignore[no-untyped-def]
    documents = len(by_degree)
    order, begins = np.empty(documents, np.int64), np.zeros(documents, np.bool_)
    visited = np.zeros(documents, np.bool_)
    count = 0
    for first in by_degree:
        document = first
        if visited[document]:
            continue
        begins[count] = True
        while document >= 0:
            visited[document] = True
            order[count] = document
            count += 1
            following = -1
            for pair in range(starts[document], starts[document + 1]):
                if not visited[partners[pair]]:
                    following = partners[pair]
                    break
            document = following
    return order, begins
