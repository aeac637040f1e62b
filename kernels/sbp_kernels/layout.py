"""The segment tree of a packed stream, and the mask that follows from it.

A stream of T tokens is cut into segments; each may have a parent, and segments stand in depth-first order. A token sees
its own segment up to itself and all of its ancestors. In that order every key j is seen by one contiguous run of queries,
so the whole mask is one integer a token: query i sees key j if and only if `j <= i < visible_until[j]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # == of tensors has no single truth value
class PackedLayout:
    """Segments of one packed stream. Make one with `from_lengths`, `from_pairs` or `from_tree`.

    Attributes:
        lengths: tokens of each segment, in stream order; their sum is T.
        parents: index of each segment's parent, -1 for a root.
        visible_until: int32 [T], one past the last query that sees each token.
        positions: int32 [T], rotary positions; a child continues where its parent ended.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    visible_until: Tensor
    positions: Tensor

    @staticmethod
    def from_lengths(lengths: Sequence[int]) -> PackedLayout:
        """Independent documents: each token sees its own document up to itself."""
        return PackedLayout.from_tree(lengths, [-1] * len(lengths))

    @staticmethod
    def from_pairs(pairs: Sequence[tuple[int, int]]) -> PackedLayout:
        """Pairs of (first length, second length); the second sees the first, not the reverse."""
        lengths = [length for pair in pairs for length in pair]
        return PackedLayout.from_tree(lengths, [parent for index in range(len(pairs)) for parent in (-1, 2 * index)])

    @staticmethod
    def from_tree(lengths: Sequence[int], parents: Sequence[int]) -> PackedLayout:
        """Any forest in depth-first order.

        Args:
            lengths: tokens of each segment, at least one.
            parents: for each segment an index below its own, or -1; the parent must be the segment before or one of that
                one's ancestors (this is what depth-first order means).

        Raises:
            ValueError: naming the argument and the segment.
        """
        lengths, parents = tuple(int(length) for length in lengths), tuple(int(parent) for parent in parents)
        if len(lengths) != len(parents):
            raise ValueError(f"lengths and parents must be as many: {len(lengths)} and {len(parents)}")
        if sum(lengths) >= 1 << 31:
            raise ValueError(f"lengths sum to {sum(lengths)}, beyond int32: split the stream")
        starts = np.cumsum([0, *lengths])
        first_position = np.zeros(len(lengths), np.int64)
        end_of_descendants = starts[1:].copy()
        open_path: list[int] = []  # the segment before and its ancestors, root first
        for segment, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
            if length < 1:
                raise ValueError(f"lengths[{segment}] is {length}: leave empty segments out")
            while open_path and open_path[-1] != parent:
                open_path.pop()
            if parent != -1 and not open_path:
                raise ValueError(
                    f"parents[{segment}] is {parent}: not the segment before it nor an ancestor of that (depth-first order)"
                )
            if parent != -1:
                first_position[segment] = first_position[parent] + lengths[parent]
            end_of_descendants[open_path] = starts[segment + 1]
            open_path.append(segment)
        tokens_before = np.repeat(starts[:-1], lengths)
        positions = np.arange(starts[-1]) - tokens_before + np.repeat(first_position, lengths)
        visible_until = np.repeat(end_of_descendants, lengths)
        return PackedLayout(lengths, parents, _int32(visible_until), _int32(positions))

    def __len__(self) -> int:
        """Tokens in the stream, T."""
        return int(self.positions.shape[0])

    def path(self, segment: int) -> list[int]:
        """`segment` and its ancestors, root first: all that its tokens see."""
        chain = [segment]
        while (parent := self.parents[chain[-1]]) != -1:
            chain.append(parent)
        return chain[::-1]

    def visible_pairs(self) -> int:
        """Number of (query, key) pairs that the mask lets through; what document-aware FLOP counts are made of."""
        return int(self.positions.long().add(1).sum())

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout with its tensors on `device`."""
        return PackedLayout(self.lengths, self.parents, self.visible_until.to(device), self.positions.to(device))


def _int32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))
