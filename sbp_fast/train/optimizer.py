"""AdamW and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from sbp_fast.config import TrainConfig


def make_optimizer(model: nn.Module, recipe: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices alone: norm gains have no reason to be small."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), fused=True)


def learning_rate(recipe: TrainConfig, step: int, steps: int) -> float:
    """Rate of `step` of `steps`: linear warm-up, then constant or half a cosine down to the final share."""
    warmup = max(1, round(recipe.warmup_share * steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    share = recipe.final_learning_rate_share
    return recipe.learning_rate * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * progress)))
