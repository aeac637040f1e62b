"""The best k of what a query has met so far, and the products that decide between them."""

from __future__ import annotations

from threading import Lock

import numba
import numpy as np
import torch
from sbp_kernels import nearest_in_buckets
from torch import Tensor

NOBODY = -1
ONE_BLOCK = Lock()  # of queries at a time on a device, which has memory for one; threads rank the others meanwhile


class HeapBest:
    """The k members of greatest product with each of Q queries, among those shown so far; never the query itself.

    One heap a query: a product that does not beat the worst of the k costs one comparison.

    Attributes:
        ids: int64 [Q, k] members in no order; `NOBODY` where fewer than k were shown.

    Args:
        own_Q: int64, the member that each query is; `NOBODY` for one that is none.
    """

    def __init__(self, own_Q: np.ndarray, k: int) -> None:
        self._own = own_Q
        self._scores = np.full((len(own_Q), k), -np.inf, dtype=np.float32)
        self.ids = np.full((len(own_Q), k), NOBODY, dtype=np.int64)

    def add(self, scores_PM: Tensor, queries_P: Tensor, members_M: Tensor) -> None:
        """Show `members_M` to `queries_P` (places among the Q) with their products."""
        _push(scores_PM.numpy(), queries_P.numpy(), members_M.numpy(), self._own, self._scores, self.ids)


def best_by_rounds(members_ND: Tensor, starts: Tensor, own_Q: Tensor, rounds_RQ: Tensor, k: int) -> np.ndarray:
    """The k members of greatest product with each of Q queries, never the query itself, on the device of the tensors.

    Args:
        members_ND: float32, those of a bucket side by side.
        starts: int64 [buckets + 1], the first member of each bucket, and N.
        own_Q: int64, the member that each query is.
        rounds_RQ: int64, the bucket that each query is shown in each round, nearest first.

    Returns:
        int64 [Q, k] rows of `members_ND`; `NOBODY` where fewer than k were shown.
    """
    with ONE_BLOCK:
        places_QK = torch.full((len(own_Q), k), NOBODY, device=members_ND.device)
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
        heap, held = heaps[query], ids[query]
        for column in range(len(members)):
            score = scores[row, column]
            if score <= heap[0] or members[column] == own[query]:
                continue
            place = 0  # the least is at the top: sink the new one from there
            while 2 * place + 1 < k:
                child = 2 * place + 1
                if child + 1 < k and heap[child + 1] < heap[child]:
                    child += 1
                if heap[child] >= score:
                    break
                heap[place], held[place] = heap[child], held[child]
                place = child
            heap[place], held[place] = score, members[column]


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _products(left: np.ndarray, first: np.ndarray, right: np.ndarray, second: np.ndarray) -> np.ndarray:
    found = np.empty(len(first), np.float32)
    for pair in range(len(first)):
        a, b = left[first[pair]], right[second[pair]]
        total = np.float32(0)
        for i in range(len(a)):
            total += a[i] * b[i]
        found[pair] = total
    return found


def products(left: np.ndarray, first: np.ndarray, right: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The inner product of rows `first` of `left` with rows `second` of `right`, float32 [pairs].

    Always the same bits for the same two vectors, in either direction and wherever they lie, which no matrix product gives.

    Args:
        left, right: float32 [rows, dimension].
        first, second: int64 [pairs].
    """
    return _products(left, first, right, second)


def rank(vectors: np.ndarray, queries: np.ndarray, own: np.ndarray, found: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Order what a search found by exact product, equals by id, and keep k.

    A search by rounded products should bring a few more than k, so that its rounding does not decide who is among them.

    Args:
        vectors: float32 [members, dimension].
        queries: float32 [queries, dimension].
        own: int64 [queries], the member that each query is, or `NOBODY`.
        found: int64 [queries, any] members in any order, none twice; `NOBODY` where there are none.

    Returns:
        int64 [queries, k] members and float32 [queries, k] products, greatest first; `NOBODY` and -inf where none is left.
    """
    rows, columns = np.nonzero((found != NOBODY) & (found != own[:, None]))
    scores = np.full(found.shape, -np.inf, dtype=np.float32)
    scores[rows, columns] = products(queries, rows, vectors, found[rows, columns])
    return keep_best(found, scores, k)


def keep_best(ids: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each row, greatest first, equals by id; `NOBODY` and -inf where there are fewer. Both [rows, k]."""
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    scores = np.take_along_axis(scores, order, axis=1)
    ids = np.where(np.isneginf(scores), NOBODY, np.take_along_axis(ids, order, axis=1))
    room = ((0, 0), (0, k - order.shape[1]))
    return np.pad(ids, room, constant_values=NOBODY), np.pad(scores, room, constant_values=-np.inf)
