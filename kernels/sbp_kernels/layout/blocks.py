"""The blocks of a fixed grid that meet: which key blocks each query block sees, and which query blocks see each key block.

For kernels of others, which walk lists of such blocks. The tiles of `plan`, which our kernels walk, begin with segments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from sbp_kernels.layout.plan import Array


class BlockLists(NamedTuple):
    """For each block of one side, the blocks of the other side that it meets; int32, ascending, padded with zeros.

    Attributes:
        partial_count: [blocks], how many of them hold visible pairs and others.
        partial: [blocks, blocks of the other side], which these are.
        full_count: [blocks], how many of them hold visible pairs alone.
        full: [blocks, blocks of the other side], which these are.
    """

    partial_count: Tensor
    partial: Tensor
    full_count: Tensor
    full: Tensor


def is_visible(query: Any, key: Any, until: Any) -> Any:
    """Whether queries see keys, given `visible_until` of the keys: the rule of every layout, in operators alone.

    Tensors of torch and the scalars that FlashAttention-4 compiles both have these operators.
    """
    return (key <= query) & (query < until)


def list_blocks(visible_until: Array, query_rows: int, key_rows: int) -> tuple[BlockLists, BlockLists]:
    """List the key blocks of each query block, and the query blocks of each key block.

    Two blocks meet where a query of the one sees a key of the other. A block that the end of the sequence cuts short is in no
    list of full blocks, as in FlexAttention.

    Args:
        visible_until: int32 [T], of a checked mask: each token sees itself.
        query_rows: queries of a block.
        key_rows: keys of a block.
    """
    tokens = len(visible_until)
    until = np.pad(visible_until, (0, -tokens % key_rows)).reshape(-1, key_rows)  # no query sees the padding
    start = np.arange(len(until)) * key_rows
    # each token sees itself, so the queries that see a block follow each other from its start to its largest `until`
    end = -(-until.max(1) // query_rows)
    first_full = np.minimum(-(-(start + key_rows - 1) // query_rows), end)  # from its last key on all may see all
    end_full = np.maximum(until.min(1) // query_rows, first_full)
    spans = np.stack([start // query_rows, first_full, end_full, end], 1)
    by_query, by_key = _meetings(spans, -(-tokens // query_rows))
    return _as_tensors(*by_query), _as_tensors(*by_key)


def _as_tensors(counts: Array, lists: Array) -> BlockLists:
    counted, listed = torch.from_numpy(counts), torch.from_numpy(lists)
    return BlockLists(counted[0], listed[0], counted[1], listed[1])


@njit(cache=True)
def _meetings(spans, queries):  # type: ignore[no-untyped-def]
    """By query block and by key block: how many blocks each meets [2, blocks] and which [2, blocks, blocks], partial then full.

    A row of `spans` holds first, first full, end of the full and end of the query blocks that a key block meets.
    """
    keys = len(spans)
    query_counts, query_lists = np.zeros((2, queries), np.int32), np.zeros((2, queries, keys), np.int32)
    key_counts, key_lists = np.zeros((2, keys), np.int32), np.zeros((2, keys, queries), np.int32)
    for key in range(keys):
        first, first_full, end_full, end = spans[key]
        for query in range(first, end):
            kind = 1 if first_full <= query < end_full else 0
            query_lists[kind, query, query_counts[kind, query]] = key
            query_counts[kind, query] += 1
            key_lists[kind, key, key_counts[kind, key]] = query
            key_counts[kind, key] += 1
    return (query_counts, query_lists), (key_counts, key_lists)
