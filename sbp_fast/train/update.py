"""The parameter update of a training step: normalise and clip the gradients, then step every optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sbp_fast.config import TrainConfig
from sbp_fast.train.optimizer import Optimizers


def update(
    optimizers: Optimizers, gradients: Sequence[Tensor], recipe: TrainConfig, rate: float, loss_tokens: Tensor
) -> Tensor:
    """Divide summed gradients by the number of tokens with loss, clip them to the recipe's norm, and step.

    Where the norm is not finite, weights and optimizer state stay bit for bit as they are. AdamW needs no host-device
    synchronisation for that; any other optimizer reads on the host whether the norm is finite.

    Args:
        optimizers: the optimizers of all parameters.
        gradients: of all parameters, summed over the tokens with loss of all processes.
        recipe: gives the largest gradient norm.
        rate: learning rate.
        loss_tokens: float32 scalar on the device, summed over all processes.

    Returns:
        The gradient norm before clipping, float32 scalar.
    """
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm) / loss_tokens
    scale = (recipe.gradient_clip / (norm + 1e-6)).clamp(max=1.0) / loss_tokens
    torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        if isinstance(optimizer, torch.optim.AdamW):
            # the switch of the fused update itself, which torch.amp.GradScaler uses
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor; a tensor that is not sharded is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
