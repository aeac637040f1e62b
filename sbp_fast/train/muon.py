"""Muon with its orthogonalisation in float32: for CPUs without fast bfloat16, where torch's takes eight times as long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` with `match_rms_adamw`, but for the precision in which it orthogonalises."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters that have a gradient; return what `closure`, if there is one, computes before."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            momentum, rate = group["momentum"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                direction = orthogonalize(
                    parameter.grad.lerp(buffer, momentum), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(direction, alpha=-rate * 0.2 * max(parameter.shape) ** 0.5)
        return loss


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float) -> Tensor:
    """Return U S V.T of a matrix U D V.T, with the values of the diagonal S about 1, in the matrix's dtype.

    Newton-Schulz iteration with the coefficients of a quintic polynomial (Jordan et al. 2024).
    """
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=epsilon)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
