"""Inputs and references for the tests of `linear_cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
MODES = ["slab", "recompute"]


def inputs(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + 1000 * seed)
    hidden, weight = (torch.randn(shape, generator=generator) * spread for shape in ((rows, width), (vocabulary, width)))
    targets = torch.randint(-1, vocabulary, (rows,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets.where(targets >= 0, IGNORED)


def with_gradients(
    loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor | float = 1.0, **options: Any
) -> list[Tensor]:
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    value = loss(*leaves, targets, **options)
    total = (value * (upstream.to(value.dtype) if isinstance(upstream, Tensor) else upstream)).sum()
    return [value.detach(), *torch.autograd.grad(total, leaves)]


def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
