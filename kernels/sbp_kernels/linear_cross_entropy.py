"""Output projection and cross-entropy in one, so that the logits of all rows never exist together.

Logits live for one bounded slab of rows; the exact gradients are computed while they do, in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLAB_ROWS = 512


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, slab_rows: int = SLAB_ROWS
) -> Tensor:
    """Sum over the rows that carry loss of -log softmax(hidden @ weight.T)[target].

    Args:
        hidden: [T, H].
        weight: [V, H], the output projection.
        targets: int64 [T]; rows equal to `ignore_index` are left out of the projection altogether.
        slab_rows: rows whose logits exist at a time.

    Returns:
        A float32 scalar (float64 for float64 input), differentiable in `hidden` and `weight`. Divide it by the caller's
        own count of loss tokens.

    Raises:
        ValueError: shapes that do not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        found = f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        raise ValueError(f"hidden [T, H], weight [V, H], targets [T] do not fit: {found}")
    if targets.dtype != torch.int64 or slab_rows < 1:
        raise ValueError(f"targets must be int64, not {targets.dtype}, and slab_rows at least 1, not {slab_rows}")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows = (targets != ignore_index).nonzero().squeeze(1)
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(
        hidden.index_select(0, rows), weight, targets.index_select(0, rows), slab_rows, with_gradient
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, slab_rows: int, with_gradient: bool) -> Tensor:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if with_gradient else None
        weight_gradient = torch.zeros_like(weight, dtype=accumulate) if with_gradient else None
        buffer = hidden.new_empty(min(slab_rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), slab_rows):
            rows = slice(start, start + slab_rows)
            logits = torch.mm(hidden[rows], weight.T, out=buffer[: len(hidden[rows])]).to(accumulate)
            target = targets[rows].unsqueeze(1)
            target_logit = logits.gather(1, target)
            largest = logits.amax(1, keepdim=True)
            exponentials = logits.sub_(largest).exp_()
            normalizer = exponentials.sum(1, keepdim=True)
            total += (normalizer.log() + largest - target_logit).sum()
            if hidden_gradient is None or weight_gradient is None:
                continue
            probabilities = exponentials.div_(normalizer)
            probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=accumulate))
            gradient = probabilities.to(hidden.dtype)
            torch.mm(gradient, weight, out=hidden_gradient[rows])
            weight_gradient.addmm_(gradient.T.to(accumulate), hidden[rows].to(accumulate))
        if with_gradient:
            ctx.save_for_backward(hidden_gradient, weight_gradient)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = gradient.to(weight_gradient.dtype)
        return (hidden_gradient * scale).to(hidden_gradient.dtype), (weight_gradient * scale).to(ctx.weight_dtype), *[None] * 3
