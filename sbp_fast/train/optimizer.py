"""The optimizers, their learning rate, and the one update of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sbp_fast.config import TrainConfig

Optimizers = list[torch.optim.Optimizer]


def make_optimizers(model: nn.Module, recipe: TrainConfig) -> Optimizers:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices alone: norm gains have no reason to be small.

    With "muon" the layers' matrices go to torch.optim.Muon (Jordan et al. 2024), whose updates are scaled to the size of
    AdamW's (Liu et al. 2025, section 2.2), so that one learning rate and one weight decay serve both.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    inner = [p for name, p in named if name.startswith("layers.") and p.dim() == 2 and recipe.optimizer == "muon"]
    taken = {id(parameter) for parameter in inner}
    rest = [parameter for _, parameter in named if id(parameter) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (recipe.beta1, recipe.beta2)
    adamw = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, eps=recipe.epsilon, fused=True)
    if not inner:
        return [adamw]
    decay = recipe.weight_decay
    muon = torch.optim.Muon(inner, lr=recipe.learning_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def learning_rate(recipe: TrainConfig, step: int, steps: int) -> float:
    """Rate of `step` of `steps`: linear warm-up, then as the schedule has it.

    "cosine" falls by half a cosine to the final share; "warmup-stable-decay" stays, and falls linearly to it over the last
    `decay_fraction` of the steps (Hu et al. 2024, section 4.2); "constant" stays.
    """
    warmup = max(1, round(recipe.warmup_fraction * steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    share = recipe.final_learning_rate_fraction
    if recipe.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - 1 - warmup)
        return recipe.learning_rate * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * progress)))
    if recipe.schedule == "warmup-stable-decay":
        decay = max(1, min(round(recipe.decay_fraction * steps), steps - warmup))
        progress = max(0, step + 1 - (steps - decay)) / decay
        return recipe.learning_rate * (1 - (1 - share) * progress)
    return recipe.learning_rate


def update(
    optimizers: Optimizers, gradients: Sequence[Tensor], recipe: TrainConfig, rate: float, loss_tokens: Tensor
) -> Tensor:
    """Divide summed gradients by the number of tokens with loss, clip them to the recipe's norm, and step.

    Nothing waits for the device, except that Muon asks whether the norm is finite. Where it is not, weights and optimizers
    stay as they are, to the bit.

    Args:
        gradients: of all parameters, sums over the tokens with loss of all processes.
        rate: learning rate.
        loss_tokens: float32 scalar on the device, of all processes.

    Returns:
        The norm before clipping, float32 scalar.
    """
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm) / loss_tokens
    scale = (recipe.gradient_clip / (norm + 1e-6)).clamp(max=1.0) / loss_tokens
    torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        if isinstance(optimizer, torch.optim.AdamW):
            # the fused update's own switch, which torch.amp.GradScaler uses
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
