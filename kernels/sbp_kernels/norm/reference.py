"""RMSNorm by its definition in float64, for tests."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return the normed [..., W] and x + residual, in float64."""
    total = x.double() if residual is None else x.double() + residual.double()
    return total / (total.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double(), total
