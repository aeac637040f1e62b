"""SwiGLU (Shazeer 2020, equation 6), alone or with the projection after it, whose input is then never saved."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sbp_kernels._backends import runs_triton
from sbp_kernels._operands import dense
from sbp_kernels._registration import register_operation


def swiglu(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """`silu(gate) * up`, where gate is the first half of the last dimension and up the second.

    Its own kernels are for eager code only: under torch.compile "auto" is the plain expression, which Inductor fuses.

    Args:
        gate_up: [..., 2F] in bfloat16, float16 or float32, any strides (any float dtype with backend "torch").
        backend: "torch", "triton", or "auto": Triton for CUDA tensors outside torch.compile, else torch.

    Returns:
        [..., F] in the dtype of gate_up, computed in float32 and rounded once by the kernels. Differentiable once; only
        gate_up is saved.

    Raises:
        ValueError: an odd last dimension; a backend that is unknown or cannot run here.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2F], gate before up: its last dimension is {gate_up.shape[-1]}")
    if runs_triton(backend, gate_up):
        return torch.ops.sbp_kernels.swiglu(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def swiglu_linear(gate_up: Tensor, down_weight: Tensor, *, backend: str = "auto") -> Tensor:
    """`swiglu(gate_up) @ down_weight.T`, which saves gate_up and never the product.

    The backward computes the product again in the kernel that computes the gradient of gate_up, which reads all that it
    takes anyway; a layer keeps 2F numbers a token instead of 3F (4F in plain torch). Under torch.compile "auto" is the
    plain expression, and what is saved is Inductor's choice. Under autocast it multiplies in the dtype of autocast.

    Args:
        gate_up: [..., 2F], as in `swiglu`.
        down_weight: [W, F] in the dtype of gate_up.
        backend: as in `swiglu`.

    Returns:
        [..., W]; differentiable once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; a backend that is unknown or cannot run here.
    """
    if torch.is_autocast_enabled(gate_up.device.type):
        dtype = torch.get_autocast_dtype(gate_up.device.type)
        gate_up, down_weight = gate_up.to(dtype), down_weight.to(dtype)
    if down_weight.dim() != 2 or gate_up.shape[-1] != 2 * down_weight.shape[1]:
        given = f"{tuple(down_weight.shape)}, {tuple(gate_up.shape)}"
        raise ValueError(f"down_weight must be [W, F] for gate_up [..., 2F]: got {given}")
    if (down_weight.dtype, down_weight.device) != (gate_up.dtype, gate_up.device):
        raise ValueError(f"down_weight, {down_weight.dtype} on {down_weight.device}, must share dtype and device with gate_up")
    if runs_triton(backend, gate_up):
        return _SwiGLULinear.apply(gate_up, down_weight)
    return F.linear(swiglu(gate_up, backend="torch"), dense(down_weight))


class SwiGLU(nn.Module):
    """The feed-forward `down(silu(gate(x)) * up(x))`, gate and up in one projection, none with a bias.

    `down_proj` is not called: only its weight is read, so that hooks on it do not run.
    """

    def __init__(self, width: int, feed_forward_width: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * feed_forward_width, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(feed_forward_width, width, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] of x [..., W]."""
        return swiglu_linear(self.gate_up_proj(x), self.down_proj.weight)


class _SwiGLULinear(torch.autograd.Function):
    """Not an operation of its own, so that compilers and FLOP counters see its matrix products."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, down_weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, down_weight)
        return F.linear(torch.ops.sbp_kernels.swiglu(gate_up), down_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, down_weight = ctx.saved_tensors
        for_weight = ctx.needs_input_grad[1]
        gate_up_gradient, product = torch.ops.sbp_kernels.swiglu_backward(gradient @ down_weight, gate_up, for_weight)
        if not for_weight:
            return gate_up_gradient, None
        gradient_rows, product_rows = (x.reshape(-1, x.shape[-1]) for x in (gradient, product))
        return gate_up_gradient, gradient_rows.T @ product_rows


def _fake_swiglu(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _fake_swiglu_backward(gradient: Tensor, gate_up: Tensor, emit_product: bool) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(gradient.shape if emit_product else 0)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> Tensor:
    return torch.ops.sbp_kernels.swiglu_backward(gradient, *ctx.saved_tensors, False)[0]


register_operation(
    "swiglu(Tensor gate_up) -> Tensor", "swiglu.triton.forward", _fake_swiglu, backward=_differentiate, save=_save
)
register_operation(
    "swiglu_backward(Tensor gradient, Tensor gate_up, bool emit_product) -> (Tensor, Tensor)",
    "swiglu.triton.backward",
    _fake_swiglu_backward,
)
