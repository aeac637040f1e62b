"""The k nearest vectors that each query has met so far, and the inner products that decide between them."""

from __future__ import annotations

from threading import Lock

import numba
import numpy as np
import torch
from sbp_kernels import nearest_in_buckets
from torch import Tensor

NO_NEIGHBOR = -1
DEVICE_LOCK = Lock()  # a device has memory for one block of queries at a time; threads rerank others meanwhile


class TopKHeaps:
    """The k vectors of greatest product with each of Q queries among those added so far, the query itself excluded.

    One heap a query: a product that does not beat the least of the k costs one comparison.

    Attributes:
        ids: int64 [Q, k], in no order; `NO_NEIGHBOR` where fewer than k were added.

    Args:
        own_Q: int64, the id of each query; `NO_NEIGHBOR` for a query that is none of the vectors.
        k: neighbors of each query.
    """

    def __init__(self, own_Q: np.ndarray, k: int) -> None:
        self._own = own_Q
        self._scores = np.full((len(own_Q), k), -np.inf, dtype=np.float32)
        self.ids = np.full((len(own_Q), k), NO_NEIGHBOR, dtype=np.int64)

    def add(self, scores_PM: Tensor, queries_P: Tensor, ids_M: Tensor) -> None:
        """Add the vectors `ids_M` to the queries `queries_P` (indices among the Q), with their products."""
        _push(scores_PM.numpy(), queries_P.numpy(), ids_M.numpy(), self._own, self._scores, self.ids)


def top_k_by_rounds(members_ND: Tensor, starts: Tensor, own_Q: Tensor, rounds_RQ: Tensor, k: int) -> np.ndarray:
    """Find the k members of greatest product with each of Q queries, never the query itself, on the tensors' device.

    Args:
        members_ND: float32, those of a bucket side by side.
        starts: int64 [buckets + 1], the first member of each bucket, and N.
        own_Q: int64, the member that each query is.
        rounds_RQ: int64, the bucket that each query meets in each round, nearest first.
        k: members of each query.

    Returns:
        int64 [Q, k] rows of `members_ND`; `NO_NEIGHBOR` where a query met fewer than k.
    """
    with DEVICE_LOCK:
        places_QK = torch.full((len(own_Q), k), NO_NEIGHBOR, device=members_ND.device)
        scores_QK = torch.full((len(own_Q), k), -torch.inf, device=members_ND.device)
        queries_QD = members_ND[own_Q]
        for buckets_Q in rounds_RQ:
            nearest_in_buckets(scores_QK, places_QK, queries_QD, own_Q, buckets_Q, members_ND, starts)
        return places_QK.cpu().numpy()


@numba.njit(nogil=True, cache=True)
def _push(
    scores: np.ndarray, queries: np.ndarray, members: np.ndarray, own: np.ndarray, heaps: np.ndarray, ids: np.ndarray
) -> None:
    k = heaps.shape[1]
    for row in range(len(queries)):
        query = queries[row]
        heap, heap_ids = heaps[query], ids[query]
        for column in range(len(members)):
            score = scores[row, column]
            if score <= heap[0] or members[column] == own[query]:
                continue
            node = 0  # the least is at the top: sink the new one from there
            while 2 * node + 1 < k:
                child = 2 * node + 1
                if child + 1 < k and heap[child + 1] < heap[child]:
                    child += 1
                if heap[child] >= score:
                    break
                heap[node], heap_ids[node] = heap[child], heap_ids[child]
                node = child
            heap[node], heap_ids[node] = score, members[column]


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _inner_products(left: np.ndarray, first: np.ndarray, right: np.ndarray, second: np.ndarray) -> np.ndarray:
    products = np.empty(len(first), np.float32)
    for pair in range(len(first)):
        a, b = left[first[pair]], right[second[pair]]
        total = np.float32(0)
        for i in range(len(a)):
            total += a[i] * b[i]
        products[pair] = total
    return products


def inner_products(left: np.ndarray, first: np.ndarray, right: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the inner products of rows `first` of `left` with rows `second` of `right`, float32 [pairs].

    The same two vectors always give the same bits, in either direction and wherever they are stored. No matrix product
    guarantees that.

    Args:
        left: float32 [rows, dimension].
        first: int64 [pairs].
        right: float32 [rows, dimension].
        second: int64 [pairs].
    """
    return _inner_products(left, first, right, second)


def rerank(vectors: np.ndarray, queries: np.ndarray, own: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Order what a search returned by exact product, equal products by id, and take the first k.

    A search by rounded products should return a few more than k, so that its rounding does not decide which are among them.

    Args:
        vectors: float32 [members, dimension].
        queries: float32 [queries, dimension].
        own: int64 [queries], the member that each query is, or `NO_NEIGHBOR`.
        ids: int64 [queries, any], members in any order, none twice; `NO_NEIGHBOR` where there is none.
        k: members of each query.

    Returns:
        int64 members and float32 products, both [queries, k], greatest first; `NO_NEIGHBOR` and -inf where there are fewer.
    """
    rows, columns = np.nonzero((ids != NO_NEIGHBOR) & (ids != own[:, None]))
    scores = np.full(ids.shape, -np.inf, dtype=np.float32)
    scores[rows, columns] = inner_products(queries, rows, vectors, ids[rows, columns])
    return take_top_k(ids, scores, k)


def take_top_k(ids: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best of each row, greatest first, equals by id; `NO_NEIGHBOR` and -inf where there are fewer.

    Both results are [rows, k].
    """
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    scores = np.take_along_axis(scores, order, axis=1)
    ids = np.where(np.isneginf(scores), NO_NEIGHBOR, np.take_along_axis(ids, order, axis=1))
    padding = ((0, 0), (0, k - order.shape[1]))
    return np.pad(ids, padding, constant_values=NO_NEIGHBOR), np.pad(scores, padding, constant_values=-np.inf)
