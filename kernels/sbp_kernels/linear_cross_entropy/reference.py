"""The loss by its definition in float64, for tests."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    *,
    row_weight: Tensor | None = None,
    reduction: str = "sum",
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss by its definition, in float64; rows with `ignore_index` count nothing.

    Each other row has row_weight * (cross-entropy of the smoothed target + z_loss * log-sum-exp^2); "none" gives [T].
    """
    rows = (targets != ignore_index).nonzero().squeeze(1)
    logits = hidden[rows].double() @ weight.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    smoothed = torch.full_like(logits, label_smoothing / len(weight))
    smoothed[torch.arange(len(rows)), targets[rows]] += 1 - label_smoothing
    losses = -(smoothed * logits.log_softmax(-1)).sum(-1) + z_loss * logits.logsumexp(-1).square()
    weights = torch.ones_like(losses) if row_weight is None else row_weight[rows].double()
    if reduction == "none":
        return losses.new_zeros(len(targets)).index_put((rows,), losses * weights)
    return (losses * weights).sum() / (weights.sum() if reduction == "mean" else 1)
