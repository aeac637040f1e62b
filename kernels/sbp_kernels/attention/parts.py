"""The parts of attention over packed segments: blocks of queries and keys that meet, those of one shape as one batch.

Each segment's keys are met twice: by the segment itself, causally, and by all of its descendants at once, which stand behind it
without a gap and see it whole. Each call of an operation costs some 20 microseconds, which thousands of short documents in a
packed sequence cannot afford one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sbp_kernels.layout.plan import find_segments


@dataclass(frozen=True)
class Rows:
    """The rows of N blocks of L rows each in a packed sequence.

    Attributes:
        index: the rows, int64 [N * L]; a slice where the blocks follow each other without a gap, so that nothing is copied.
        blocks: N.
    """

    index: Tensor | slice
    blocks: int

    @staticmethod
    def of(starts: np.ndarray, length: int, device: torch.device) -> Rows:
        """Return the rows of the blocks of `length` rows that begin at `starts`, int32 [N], rising."""
        blocks, first = len(starts), int(starts[0])
        if starts[-1] - first == (blocks - 1) * length:
            return Rows(slice(first, first + blocks * length), blocks)
        index = starts.astype(np.int64)[:, None] + np.arange(length)
        return Rows(torch.from_numpy(index.ravel()).to(device), blocks)

    def take(self, x: Tensor) -> Tensor:
        """Return these rows of x [T, H, ...] as [N, H, L, ...]."""
        rows = x[self.index] if isinstance(self.index, slice) else x.index_select(0, self.index)
        return rows.unflatten(0, (self.blocks, -1)).transpose(1, 2)

    def put(self, x: Tensor, part: Tensor) -> None:
        """Replace these rows of x [T, H, ...] by those of part [N, H, L, ...]."""
        if isinstance(self.index, slice):
            x[self.index].unflatten(0, (self.blocks, -1)).copy_(part.transpose(1, 2))
        else:
            x.index_copy_(0, self.index, part.transpose(1, 2).flatten(0, 1).to(x.dtype))


@dataclass(frozen=True)
class Part:
    """N blocks of queries, each with the block of keys that it meets.

    Attributes:
        queries: N blocks.
        keys: N blocks.
        causal: whether the queries are the keys' own segments; else they are all of these segments' descendants.
        first: whether the queries meet no keys in an earlier part.
    """

    queries: Rows
    keys: Rows
    causal: bool
    first: bool


def find_parts(visible_until: Tensor) -> Iterator[Part]:
    """Yield the parts of a mask, int32 [T], so that each query meets its root first, and each key its own segment first.

    At each depth of the tree a query meets one segment at most, so no row is twice among the queries of a part, nor among its
    keys: a part's rows may be changed in one operation.
    """
    starts, ends, until, parents, _ = find_segments(visible_until.cpu().numpy())
    depths = _depths(parents)
    has_descendants = until > ends
    for depth in range(depths.max(initial=-1) + 1):
        at_depth = depths == depth
        for causal, chosen in (True, at_depth), (False, at_depth & has_descendants):
            keys, query_starts, query_ends = starts[chosen], *((starts, ends) if causal else (ends, until))
            lengths = np.stack([(query_ends - query_starts)[chosen], (ends - starts)[chosen]])
            for (query_length, key_length), members in _groups(lengths):
                queries = Rows.of(query_starts[chosen][members], query_length, visible_until.device)
                yield Part(queries, Rows.of(keys[members], key_length, visible_until.device), causal, depth == 0)


def _depths(parents: np.ndarray) -> np.ndarray:
    """Return the number of ancestors of each segment."""
    depths, ancestors = np.zeros_like(parents), parents
    while (has_ancestor := ancestors >= 0).any():
        depths += has_ancestor
        ancestors = np.where(has_ancestor, parents[ancestors], -1)
    return depths


def _groups(columns: np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield each distinct column of [2, N] with the rising indices of the columns that equal it."""
    order = np.lexsort(columns)  # stable
    boundaries = np.flatnonzero((np.diff(columns[:, order]) != 0).any(0)) + 1
    for members in np.split(order, boundaries):
        if len(members):
            yield columns[:, members[0]].tolist(), members
