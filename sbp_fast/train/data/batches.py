"""Packed sequences, which one forward and backward pass reads: tokens, their targets and the layout of their segments.

A step is a fixed number of packed sequences of a fixed length, each a pure function of (step, index), so that any number of
processes can share them and training can start at any step.
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
ROW_MULTIPLE = 256  # few different numbers of loss rows, so that the device allocator can reuse blocks


@dataclass
class Counts:
    """Counts of one packed sequence, or of many together.

    Attributes:
        tokens: all tokens: real, synthetic and padding.
        real_tokens: of the real corpus.
        synthetic_tokens: of the synthetic corpus.
        loss_tokens: tokens that have a target.
        visible_pairs: (query, key) pairs that attention computes, without padding.
        digest: sum of hashes of the document indices; two runs that read the same sequences agree in it, in any order.
    """

    tokens: int = 0
    real_tokens: int = 0
    synthetic_tokens: int = 0
    loss_tokens: int = 0
    visible_pairs: int = 0
    digest: int = 0

    def add(self, other: Counts) -> None:
        """Add the counts of another sequence."""
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + getattr(other, name))


COUNTED = [count.name for count in fields(Counts)]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One packed sequence.

    Attributes:
        tokens: int64 [T].
        targets: int64 [T], the next token of the same document, -100 where there is none or it carries no loss.
        loss_rows: int64 [R], indices of the tokens that have a target, filled up to a multiple of ROW_MULTIPLE (at most T) with
            the index of one that has none.
        layout: segments of the sequence; padding at its end is a segment of its own.
        counts: of its tokens.
        documents: indices, in their source, of the documents that it holds, in order.
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
        """Build a packed sequence of `length` tokens, padded at the end.

        Args:
            tokens: integer [at most `length`].
            targets: integer, as many.
            lengths: of the segments.
            length: of the sequence.
            parents: as for `PackedLayout.from_tree`; None where no segment has one.
            synthetic: whether the tokens count as synthetic.
            documents: indices to store.
        """
        given, padding = len(tokens), length - len(tokens)
        if padding:
            lengths, parents = [*lengths, padding], None if parents is None else [*parents, -1]
        layout = PackedLayout.from_lengths(lengths) if parents is None else PackedLayout.from_tree(lengths, parents)
        padded, padded_targets = np.zeros(length, np.int64), np.full(length, NO_TARGET, np.int64)
        padded[:given], padded_targets[:given] = tokens, targets
        rows = np.flatnonzero(padded_targets != NO_TARGET)
        counts = Counts(
            tokens=length,
            real_tokens=0 if synthetic else given,
            synthetic_tokens=given if synthetic else 0,
            loss_tokens=len(rows),
            visible_pairs=layout.visible_pairs() - padding * (padding + 1) // 2,
            digest=xxhash.xxh3_64_intdigest(np.array([synthetic, *documents], np.int64).tobytes()) >> 33,
        )
        arrays = padded, padded_targets, _fill_up(rows, padded_targets)
        tokens_T, targets_T, rows_R = (torch.from_numpy(array) for array in arrays)
        return PackedBatch(tokens_T, targets_T, rows_R, layout, counts, documents)

    def to(self, device: torch.device | str, *, head_width: int | None = None) -> PackedBatch:
        """Return the batch on `device`, by copies without host-device synchronisation.

        Args:
            device: where to.
            head_width: of the attention that will read the batch, which decides the tiles of its plan; None for the commonest.
        """
        if torch.device(device).type == "cpu":
            return self
        moved = [tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.tokens, self.targets, self.loss_rows)]
        layout = self.layout.to(device, head_width=head_width)
        return replace(self, tokens=moved[0], targets=moved[1], loss_rows=moved[2], layout=layout)


def _fill_up(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    capacity = min(-(-len(rows) // ROW_MULTIPLE) * ROW_MULTIPLE, len(targets))
    missing = capacity - len(rows)
    filler = int(np.argmax(targets == NO_TARGET))  # such a token exists wherever a row is missing
    return np.concatenate([rows, np.full(missing, filler)])


class Batches(Protocol):
    """The batches of one training run.

    Attributes:
        steps: of the run.
        sequences_per_step: packed sequences in a step.
        sequence_tokens: length of each.
    """

    steps: int
    sequences_per_step: int
    sequence_tokens: int

    def sequence(self, step: int, index: int) -> PackedBatch:
        """Return packed sequence `index` of a step, a pure function of the two."""


def divide_sequences(sequences: int, processes: int) -> list[range]:
    """Divide the packed sequences of a step among processes: consecutive ones, equally many for each.

    Raises:
        ValueError: the number is no multiple of the processes.
    """
    if sequences % processes:
        raise ValueError(f"{sequences} packed sequences a step cannot be divided equally among {processes} processes")
    ends = range(0, sequences + 1, sequences // processes)
    return [range(start, stop) for start, stop in pairwise(ends)]
