"""The segment tree of a packed sequence, and the mask that follows from it.

A packed sequence of T tokens is cut into segments; each may have a parent, and segments stand in depth-first order. A token
sees its own segment up to itself and all of its ancestors. In that order every key j is seen by one contiguous run of queries,
so the whole mask is one integer a token: query i sees key j if and only if `j <= i < visible_until[j]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from sbp_kernels._tuned import sizes_of_plans
from sbp_kernels.layout.device_plan import plan_documents
from sbp_kernels.layout.plan import NARROW, WIDE, Plan, Tiles, build_plan, choose_tiles, find_segments

MAXIMUM_TOKENS = (1 << 31) - 1


@dataclass(frozen=True, eq=False)  # == of tensors has no single truth value
class PackedLayout:
    """Segments of one packed sequence. Make one with one of the `from_` constructors, and `to` moves it to a device.

    Attributes:
        visible_until: int32 [T], one past the last query that sees each token.
        positions: int32 [T], rotary positions; a child continues where its parent ended.
        lengths: tokens of each segment, in order; their sum is T. None where they were never on the host.
        parents: index of each segment's parent, -1 for a root. None where `lengths` is.
        may_split: whether the plan reserves slots for keys that very many queries see.
        tiles: the tile sizes of the plan; None leaves the choice to the plan.
        plan: what the Triton kernels walk; made by `planned`, and by `to` on the way to a device.
        cu_seqlens: int32, 0, the ends, T; where the layout was made from one on a device.
    """

    visible_until: Tensor
    positions: Tensor
    lengths: tuple[int, ...] | None
    parents: tuple[int, ...] | None
    may_split: bool = False
    tiles: Tiles | None = None
    plan: Plan | None = None
    cu_seqlens: Tensor | None = None

    @staticmethod
    def from_lengths(lengths: Sequence[int], *, tiles: Tiles | None = None) -> PackedLayout:
        """Independent documents: each token sees its own document up to itself."""
        return _from_tree(lengths, [-1] * len(lengths), may_split=False, tiles=tiles)

    @staticmethod
    def from_pairs(pairs: Sequence[tuple[int, int]], *, tiles: Tiles | None = None) -> PackedLayout:
        """Pairs of (first length, second length); the second sees the first, not the reverse."""
        lengths = [length for pair in pairs for length in pair]
        parents = [parent for index in range(len(pairs)) for parent in (-1, 2 * index)]
        return _from_tree(lengths, parents, may_split=False, tiles=tiles)

    @staticmethod
    def from_tree(lengths: Sequence[int], parents: Sequence[int], *, tiles: Tiles | None = None) -> PackedLayout:
        """Any forest in depth-first order.

        Args:
            lengths: tokens of each segment, at least one.
            parents: for each segment an index below its own, or -1; the parent must be the segment before or one of that
                one's ancestors (this is what depth-first order means).
            tiles: sizes of the tiles, by default chosen from the lengths.

        Raises:
            ValueError: naming the argument and the segment.
        """
        return _from_tree(lengths, parents, may_split=True, tiles=tiles)

    @staticmethod
    def from_cu_seqlens(
        cu_seqlens: Tensor | Sequence[int], *, tokens: int | None = None, tiles: Tiles | None = None
    ) -> PackedLayout:
        """Independent documents given by their ends, [0, end of the first, ..., T], as users of flash-attn hold them.

        A document without tokens is left out, so a `cu_seqlens` padded with T to a fixed length is fine. A tensor on a
        device stays there: the plan is built on it without host-device synchronisation, so the tensor's content cannot be
        checked; tokens past its last value count as one more document.

        Args:
            cu_seqlens: [documents + 1], not decreasing.
            tokens: T; needed where `cu_seqlens` is on a device, checked elsewhere.
            tiles: as for `from_tree`; those for long documents by default where `cu_seqlens` is on a device.

        Raises:
            ValueError: naming the argument.
        """
        if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type != "cpu":
            if tokens is None:
                raise ValueError("tokens must be given where cu_seqlens is on a device: reading it would wait for the device")
            _check_tokens(tokens)
            until, positions, plan = plan_documents(cu_seqlens, tokens, tiles or _tiles_for(cu_seqlens.device)[0])
            padded = F.pad(cu_seqlens.clamp(max=tokens).int(), (0, 1), value=tokens)
            return PackedLayout(until, positions, None, None, False, plan.tiles, plan, padded)
        ends = np.asarray(cu_seqlens, np.int64)
        if ends.ndim != 1 or len(ends) == 0 or ends[0] != 0 or (np.diff(ends) < 0).any():
            raise ValueError("cu_seqlens must be one-dimensional, begin with 0 and never decrease")
        if tokens is not None and tokens != ends[-1]:
            raise ValueError(f"cu_seqlens ends with {ends[-1]}, but tokens is {tokens}: they must be equal")
        lengths = np.diff(ends)
        return PackedLayout.from_lengths(lengths[lengths > 0].tolist(), tiles=tiles)

    @staticmethod
    def from_visible_until(visible_until: ArrayLike, *, tiles: Tiles | None = None) -> PackedLayout:
        """A mask made elsewhere: query i sees key j if and only if `j <= i < visible_until[j]`.

        Segments are read off the mask, as coarse as it allows: a partner directly after its seed is one segment with it.

        Args:
            visible_until: [T] integers on the host.
            tiles: as for `from_tree`.

        Raises:
            ValueError: naming the first token whose span fits no segment tree.
        """
        until = np.asarray(visible_until)
        if until.ndim != 1 or not (np.issubdtype(until.dtype, np.integer) or until.size == 0):
            raise ValueError(f"visible_until must be integers [T]: got {until.dtype} {list(until.shape)}")
        _check_tokens(len(until))
        beyond = (until > len(until)) | (until < 0)
        until = np.where(beyond, 0, until).astype(np.int32)  # no token may have 0, so what int32 cannot hold is found too
        starts, ends, _, parents, wrong = find_segments(until)
        if wrong >= 0:
            raise ValueError(
                f"visible_until[{wrong}] is {np.asarray(visible_until)[wrong]}: it must exceed {wrong}, stay within T = "
                f"{len(until)} and within the span of every earlier token that token {wrong} sees"
            )
        return _from_tree((ends - starts).tolist(), parents.tolist(), may_split=True, tiles=tiles)

    def __len__(self) -> int:
        """Number of tokens, T."""
        return self.positions.shape[0]

    def path(self, segment: int) -> list[int]:
        """`segment` and its ancestors, root first: all that its tokens see."""
        if self.parents is None:
            raise ValueError("this layout was made on a device: its segments are not known on the host")
        chain = [segment]
        while (parent := self.parents[chain[-1]]) != -1:
            chain.append(parent)
        return chain[::-1]

    def visible_pairs(self) -> int:
        """Number of (query, key) pairs that the mask lets through, for document-aware FLOP counts."""
        return int(self.positions.long().add(1).sum())

    def planned(self, device: torch.device | str = "cpu", *, head_width: int | None = None) -> PackedLayout:
        """Return the same layout with its plan, which is built on the host: call it before `to`.

        Args:
            device: whose table of tile sizes the plan is for; it serves on others too.
            head_width: of the attention that will walk the plan; by default that of most models, 128.
        """
        if self.plan is not None:
            return self
        until = self.visible_until.numpy()
        tiles = self.tiles or choose_tiles(until, *_tiles_for(torch.device(device), head_width))
        return replace(self, plan=build_plan(until, tiles, may_split=self.may_split))

    def to(self, device: torch.device | str, *, head_width: int | None = None) -> PackedLayout:
        """Return the same layout with its tensors on `device`: one copy, asynchronous on CUDA; arguments as of `planned`."""
        device = torch.device(device)
        if device == self.positions.device or (device.index is None and device.type == self.positions.device.type):
            return self
        planned = self.planned(device, head_width=head_width)
        assert planned.plan is not None
        until, positions, *tables = move_in_one_copy([self.visible_until, self.positions, *planned.plan.tables], device)
        ends = None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=True)
        plan = Plan(planned.plan.tiles, *tables)
        return replace(planned, visible_until=until, positions=positions, plan=plan, cu_seqlens=ends)


def _from_tree(lengths: Sequence[int], parents: Sequence[int], *, may_split: bool, tiles: Tiles | None) -> PackedLayout:
    lengths, parents = tuple(int(length) for length in lengths), tuple(int(parent) for parent in parents)
    if len(lengths) != len(parents):
        raise ValueError(f"lengths and parents must be as many: {len(lengths)} and {len(parents)}")
    if (total := sum(lengths)) > MAXIMUM_TOKENS:
        raise ValueError(f"lengths sum to {total}, beyond int32: split the sequence")
    if lengths and min(lengths) < 1:
        segment = next(index for index, length in enumerate(lengths) if length < 1)
        raise ValueError(f"lengths[{segment}] is {lengths[segment]}: leave empty segments out")
    starts = np.cumsum([0, *lengths])
    if not parents or max(parents) == min(parents) == -1:
        first_position, end_of_descendants = np.zeros(len(lengths), np.int64), starts[1:]
    else:
        first_position, end_of_descendants = _walk(starts, lengths, parents)
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - first_position, lengths)
    visible_until = np.repeat(end_of_descendants, lengths)
    return PackedLayout(_int32(visible_until), _int32(positions), lengths, parents, may_split, tiles)


def _walk(starts: np.ndarray, lengths: Sequence[int], parents: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The first position of each segment, and where its last descendant ends."""
    first_position = np.zeros(len(lengths), np.int64)
    end_of_descendants = starts[1:].copy()
    open_path: list[int] = []  # the segment before and its ancestors, root first
    for segment, parent in enumerate(parents):
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
    return first_position, end_of_descendants


def _tiles_for(device: torch.device, head_width: int | None = None) -> tuple[Tiles, Tiles]:
    """Return the tile sizes for long and for short documents on a device."""
    sizes = sizes_of_plans(device, head_width)
    return (Tiles(*sizes[0]), Tiles(*sizes[1])) if sizes else (WIDE, NARROW)


def _check_tokens(tokens: int) -> None:
    if tokens > MAXIMUM_TOKENS:
        raise ValueError(f"the packed sequence has {tokens} tokens, beyond int32: split it")


def _int32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))


def move_in_one_copy(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return int32 `tensors` on `device`, as views of one buffer, each at a multiple of 16 bytes."""
    sizes = [tensor.numel() for tensor in tensors]
    ends = np.cumsum([0, *((size + 3) // 4 * 4 for size in sizes)])
    buffer = torch.zeros(int(ends[-1]), dtype=torch.int32, device=tensors[0].device, pin_memory=_may_pin(tensors[0], device))
    for tensor, size, (start, _) in zip(tensors, sizes, pairwise(ends), strict=True):
        buffer[start : start + size] = tensor.flatten()
    moved = buffer.to(device, non_blocking=True)
    return [moved[start : start + tensor.numel()].view(tensor.shape) for tensor, start in zip(tensors, ends, strict=False)]


def _may_pin(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == "cpu" and device.type == "cuda"
