"""What one forward and backward pass reads: a packed stream of tokens, their targets and the layout of their segments.

A step is a fixed number of streams of a fixed length, each a pure function of (step, number), so that any number of
processes may share them out and any step can be the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
import xxhash
from sbp_kernels import PackedLayout
from torch import Tensor

NO_TARGET = -100
REAL, SYNTHETIC = "real", "synthetic"
ROW_MULTIPLE = 256  # the loss meets few different numbers of rows, which the allocator of a device likes


@dataclass
class Counts:
    """What is in a stream, or in many of them together.

    Attributes:
        tokens: all of them; real, synthetic and padding ones together.
        loss_tokens: that have a target.
        visible_pairs: (query, key) pairs that attention computes, padding left out.
        digest: of the numbers of the documents, in streams of any order: two runs that read the same agree in it.
    """

    tokens: int = 0
    real_tokens: int = 0
    synthetic_tokens: int = 0
    loss_tokens: int = 0
    visible_pairs: int = 0
    digest: int = 0

    def add(self, other: Counts) -> None:
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + getattr(other, name))


COUNTED = [part.name for part in fields(Counts)]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One stream.

    Attributes:
        tokens: int64 [T].
        targets: int64 [T], the next token of the same document, -100 where there is none or it carries no loss.
        loss_rows: int64 [R], the tokens that have a target, filled up to a multiple of ROW_MULTIPLE (at most T) with one
            that has none.
        layout: segments of the stream; the padding at its end, where there is some, is one of its own.
        counts: what is in it.
        documents: the numbers, in their source, of the documents that it holds, in order.
    """

    tokens: Tensor
    targets: Tensor
    loss_rows: Tensor
    layout: PackedLayout
    counts: Counts = field(default_factory=Counts)
    documents: Sequence[int] = ()

    @staticmethod
    def build(
        tokens: np.ndarray,
        targets: np.ndarray,
        lengths: Sequence[int],
        *,
        length: int,
        parents: Sequence[int] | None = None,
        synthetic: bool = False,
        documents: Sequence[int] = (),
    ) -> PackedBatch:
        """A stream of `length` tokens, padded at the end.

        Args:
            tokens, targets: integer [at most `length`].
            lengths: of the segments.
            parents: as for `PackedLayout.from_tree`; None where there are none.
            synthetic: whether the tokens count as synthetic ones.
            documents: numbers to remember.
        """
        given, padding = len(tokens), length - len(tokens)
        if padding:
            lengths, parents = [*lengths, padding], None if parents is None else [*parents, -1]
        layout = PackedLayout.from_lengths(lengths) if parents is None else PackedLayout.from_tree(lengths, parents)
        padded, goals = np.zeros(length, np.int64), np.full(length, NO_TARGET, np.int64)
        padded[:given], goals[:given] = tokens, targets
        rows = np.flatnonzero(goals != NO_TARGET)
        counts = Counts(
            tokens=length,
            real_tokens=0 if synthetic else given,
            synthetic_tokens=given if synthetic else 0,
            loss_tokens=len(rows),
            visible_pairs=layout.visible_pairs() - padding * (padding + 1) // 2,
            digest=xxhash.xxh3_64_intdigest(np.array([synthetic, *documents], np.int64).tobytes()) >> 33,
        )
        tokens_T, targets_T, rows_R = (torch.from_numpy(array) for array in (padded, goals, _filled_up(rows, goals)))
        return PackedBatch(tokens_T, targets_T, rows_R, layout, counts, documents)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same on `device`, by copies that do not wait for it."""
        if torch.device(device).type == "cpu":
            return self
        moved = [tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.tokens, self.targets, self.loss_rows)]
        return replace(self, tokens=moved[0], targets=moved[1], loss_rows=moved[2], layout=self.layout.to(device))


def _filled_up(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    capacity = min(-(-len(rows) // ROW_MULTIPLE) * ROW_MULTIPLE, len(targets))
    missing = capacity - len(rows)
    without = int(np.argmax(targets == NO_TARGET))  # there is one wherever something is missing
    return np.concatenate([rows, np.full(missing, without)])


class Batches(Protocol):
    """The batches of one training run.

    Attributes:
        steps: of the run.
        streams_per_step: each of them a `PackedBatch` of `stream_tokens` tokens.
    """

    steps: int
    streams_per_step: int
    stream_tokens: int

    def stream(self, step: int, number: int) -> PackedBatch:
        """Stream `number` of the batch of `step`, a pure function of the two."""


def share_out(streams: int, processes: int) -> list[range]:
    """Which streams of a step each process takes: consecutive ones, equally many.

    Raises:
        ValueError: that cannot be.
    """
    if streams % processes:
        raise ValueError(f"{streams} streams a step cannot be shared out equally among {processes} processes")
    ends = range(0, streams + 1, streams // processes)
    return [range(start, stop) for start, stop in pairwise(ends)]
