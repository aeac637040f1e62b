"""Query and key norm with rotary embedding by their definition in float64, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from sbp_kernels.norm.reference import rms_norm


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    heads: int,
    key_value_heads: int,
    theta: float = 10000.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [T, Hq, D], k and v [T, Hkv, D] of qkv [T, Hq + 2 Hkv, D], in float64.

    Numbers i and i + D/2 of a head turn as one complex number, by position * theta ** (-2 i / D) radians.
    """
    q, k, v = qkv.double().split([heads, key_value_heads, key_value_heads], 1)
    half = qkv.shape[-1] // 2
    frequencies = theta ** (torch.arange(half, dtype=torch.float64, device=qkv.device) / -half)
    angles = positions.double()[:, None, None] * frequencies
    turned = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        normed = x if weight is None else rms_norm(x, weight, eps=eps)[0]
        complex_numbers = torch.complex(normed[..., :half], normed[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        turned.append(torch.cat([complex_numbers.real, complex_numbers.imag], -1))
    return turned[0], turned[1], v
