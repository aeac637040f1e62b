"""Attention by its definition in float64, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from sbp_kernels.layout import PackedLayout
from sbp_kernels.layout.reference import dense_mask


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, softmax_scale: float | None = None) -> Tensor:
    """Compute attention by its definition: q [T, Hq, D], k and v [T, Hkv, D], in float64; returns float64 [T, Hq, D]."""
    repeats = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(repeats, 1), v.double().repeat_interleave(repeats, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale)
    weights = scores.masked_fill(~dense_mask(layout).to(q.device), float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)
