"""Plain definitions in float64 with everything written out, for tests; never used in training."""

from __future__ import annotations

import torch
from torch import Tensor

from sbp_kernels.layout import PackedLayout


def dense_mask(layout: PackedLayout) -> Tensor:
    """bool [T, T], True where query i (row) sees key j (column), read off the parents alone, not off `visible_until`."""
    segment_of = torch.repeat_interleave(torch.arange(len(layout.lengths)), torch.tensor(layout.lengths))
    sees = torch.zeros(len(layout.lengths), len(layout.lengths), dtype=torch.bool)
    for segment in range(len(layout.lengths)):
        sees[segment, layout.path(segment)] = True
    return sees[segment_of][:, segment_of].tril()


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float | None = None) -> Tensor:
    """Attention by its definition: q [T, Hq, D], k and v [T, Hkv, D], in float64; returns float64 [T, Hq, D]."""
    repeats = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(repeats, 1), v.double().repeat_interleave(repeats, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~dense_mask(layout).to(q.device), float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T)[target], in float64; rows with `ignore_index` count nothing."""
    log_probabilities = (hidden.double() @ weight.double().T).log_softmax(-1)
    rows = (targets != ignore_index).nonzero().squeeze(1)
    return -log_probabilities[rows, targets[rows]].sum()
