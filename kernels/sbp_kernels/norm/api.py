"""RMSNorm (Zhang and Sennrich 2019, equation 4), alone or with the residual addition before it.

Everything is computed in float32 and rounded once, at the end, as `torch.nn.RMSNorm` does; Llama's own code in
transformers rounds before it multiplies by the weight, which errs about 1.4 times as much in bfloat16.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbp_kernels._backends import runs_triton
from sbp_kernels._registration import register_operation


@overload
def rms_norm(x: Tensor, weight: Tensor, *, residual: None = None, eps: float = 1e-6, backend: str = "auto") -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor, eps: float = 1e-6, backend: str = "auto"
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-6, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x * x) + eps) * weight` over the last dimension; with a residual, of `x + residual`.

    Its own kernels are for eager code only: under torch.compile "auto" is the plain expression, which Inductor fuses.

    Args:
        x: [..., W] in bfloat16, float16 or float32, any strides (float64 with backend "torch").
        weight: [W], any of these dtypes; the result has the dtype of x.
        residual: shape and dtype of x.
        eps: added to the mean of squares.
        backend: "torch", "triton", or "auto": Triton for CUDA tensors outside torch.compile, else torch.

    Returns:
        y, shaped as x; with a residual (y, x + residual), whose gradients come back as one, shared by x and residual.
        Differentiable once in x, weight and residual; the weight's gradient is the same bits on every run.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; a backend that is unknown or cannot run here.
    """
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        raise ValueError(f"weight must be [W] beside x [..., W]: got {_described(weight)} beside {_described(x)}")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(f"residual must be like x: cast it from {_described(residual)} to {_described(x)}")
    if runs_triton(backend, x):
        if residual is None:
            return torch.ops.sbp_kernels.rms_norm(x, weight, eps)[0]
        return torch.ops.sbp_kernels.add_rms_norm(x, residual, weight, eps)[:2]
    if residual is None:
        return plain_rms_norm(x, weight, eps)
    total = x + residual
    return plain_rms_norm(total, weight, eps), total


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension, made and saved alike, whose call may add a residual first."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Return `rms_norm` of x [..., W]: y, or (y, x + residual)."""
        if self.weight is None or len(self.normalized_shape) != 1:
            raise ValueError("RMSNorm needs a weight over one dimension: use torch.nn.RMSNorm for other forms")
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, residual=residual, eps=eps)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute RMSNorm by torch's own operations, in the wider of the two dtypes and rounded to that of x."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)


def _described(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


def _fake_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_rms_norm_backward(
    gradient: Tensor, sum_gradient: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight, rstd = inputs[-2], output[-1]
    normed = inputs[0] if len(output) == 2 else output[1]
    ctx.save_for_backward(normed, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return None, None, None
    return *torch.ops.sbp_kernels.rms_norm_backward(gradient, None, *ctx.saved_tensors), None


def _differentiate_added(
    ctx: Any, gradient: Tensor | None, sum_gradient: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return sum_gradient, sum_gradient, None, None
    x_gradient, weight_gradient = torch.ops.sbp_kernels.rms_norm_backward(gradient, sum_gradient, *ctx.saved_tensors)
    return x_gradient, x_gradient, weight_gradient, None


register_operation(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    "norm.triton.rms_norm",
    _fake_rms_norm,
    backward=_differentiate,
    save=_save,
)
register_operation(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    "norm.triton.add_rms_norm",
    _fake_add_rms_norm,
    backward=_differentiate_added,
    save=_save,
)
register_operation(
    "rms_norm_backward(Tensor gradient, Tensor? sum_gradient, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    "norm.triton.backward",
    _fake_rms_norm_backward,
)
