"""Where the keys and values of a batch of samples lie: pages of their seeds, shared, and pages of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # == of tensors has no single truth value
class DecodeLayout:
    """The pages of G groups, each a seed and up to N samples of it, and of B rows, each a sample or idle.

    All tensors are int32, contiguous and on one device. Their shapes are capacities and their content may be refilled in
    place, so that one CUDA graph serves every step. Page 0 is scratch space for idle rows and belongs to
    no sample. Table entries beyond the tokens in use are never read.

    Attributes:
        seed_pages: [G, S] page ids of each group's seed, in the order of its tokens.
        seed_tokens: [G] tokens of each seed; 0 in an unused group.
        group_rows: [G, N] rows of each group's samples that are being generated now, -1 for none, in any order. A row that is
            not idle stands once in the group that `row_group` names, and in no other.
        row_group: [B] group of each row; any one for an idle row.
        own_pages: [B, O] page ids of each row's own tokens, in their order.
        own_tokens: [B] own tokens of each row including the newest; 0 for an idle row.
    """

    seed_pages: Tensor
    seed_tokens: Tensor
    group_rows: Tensor
    row_group: Tensor
    own_pages: Tensor
    own_tokens: Tensor

    def __post_init__(self) -> None:
        """Check shapes, dtypes and devices; the content is not read.

        Raises:
            ValueError: naming the tensor.
        """
        groups, rows, device = self.seed_tokens.shape[:1], self.own_tokens.shape[:1], self.seed_tokens.device
        sizes = {"seed_pages": (groups, 2), "seed_tokens": (groups, 1), "group_rows": (groups, 2)}
        sizes |= {"row_group": (rows, 1), "own_pages": (rows, 2), "own_tokens": (rows, 1)}
        for name, (length, dimensions) in sizes.items():
            x = getattr(self, name)
            if x.dtype != torch.int32 or x.device != device or not x.is_contiguous():
                given = f"{x.dtype} on {x.device}{'' if x.is_contiguous() else ', not contiguous'}"
                raise ValueError(f"{name} must be int32 on {device}, contiguous: got {given}")
            if x.dim() != dimensions or x.shape[:1] != length:
                shape = f"[{length[0] if length else 'any'}{', any' if dimensions == 2 else ''}]"
                raise ValueError(f"{name} must be {shape}: got {tuple(x.shape)}")

    @staticmethod
    def empty(
        groups: int, samples: int, rows: int, seed_pages: int, own_pages: int, device: torch.device | str = "cpu"
    ) -> DecodeLayout:
        """A layout of these capacities (G, N, B, S, O) whose groups are unused and whose rows are idle."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return DecodeLayout(
            seed_pages=zeros(groups, seed_pages),
            seed_tokens=zeros(groups),
            group_rows=zeros(groups, samples) - 1,
            row_group=zeros(rows),
            own_pages=zeros(rows, own_pages),
            own_tokens=zeros(rows),
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All of them, in the order of the attributes."""
        return self.seed_pages, self.seed_tokens, self.group_rows, self.row_group, self.own_pages, self.own_tokens

    @property
    def positions(self) -> Tensor:
        """int32 [B], the rotary position of each row's newest token: own tokens continue where the seed ended."""
        return (self.seed_tokens[self.row_group] + self.own_tokens - 1).clamp(min=0)
