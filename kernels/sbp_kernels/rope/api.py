"""Norm of each query and key head, then rotary embedding, on the output of the fused query-key-value projection.

Rotary embedding: Su et al. 2021, section 3.2.2, with the two halves of a head paired, as Llama and Qwen3 store it. Angles
are products of 64-bit integers, in units of 2**-64 turns, which wrap round at whole turns by themselves: they are exact to
one part in 2**32 of a turn at every position, where a float32 product is off by a hundredth of a radian at 131,072.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sbp_kernels._backends import runs_triton
from sbp_kernels._registration import register_operation
from sbp_kernels.norm.api import plain_rms_norm


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    *,
    heads: int,
    key_value_heads: int,
    theta: float = 10000.0,
    frequencies: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of attention from one projection: RMSNorm of each query and key head, then rotation.

    Its own kernels are for eager code only: under torch.compile "auto" is the plain expression, which Inductor fuses.

    Args:
        qkv: [T, Hq + 2 Hkv, D], or [T, (Hq + 2 Hkv) * D], in bfloat16, float16 or float32 (float64 with backend "torch");
            D is even; queries first, values last.
        q_weight: [D], the weight of the queries' RMSNorm; None, together with k_weight, for no norm (Llama).
        k_weight: [D].
        positions: int32 or int64 [T], the rotary position of each token, of any size; the layout's `positions`.
        heads: Hq.
        key_value_heads: Hkv.
        theta: base of the rotary frequencies, theta ** (-2 i / D).
        frequencies: int64 [D / 2] from `rotary_frequencies`, in place of those of theta (scaled embeddings).
        eps: of the norms.
        backend: "torch", "triton", or "auto": Triton for CUDA tensors outside torch.compile, else torch.

    Returns:
        q [T, Hq, D] and k [T, Hkv, D], contiguous, computed in float32 and rounded once to the dtype of qkv, and
        v [T, Hkv, D], a view of qkv. Differentiable once in qkv and the weights; the gradient of qkv is one contiguous
        tensor, the weights' gradients the same bits on every run. Saved are qkv and a float32 for each normed head.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; a backend that is unknown or cannot run here.
    """
    rows = heads + 2 * key_value_heads
    if heads < 1 or key_value_heads < 1 or qkv.dim() not in (2, 3) or math.prod(qkv.shape[1:]) % (2 * rows):
        raise ValueError(f"qkv must be [T, {heads} + 2 * {key_value_heads}, D] with D even: got {tuple(qkv.shape)}")
    if qkv.dim() == 2:
        qkv = qkv.unflatten(1, (rows, -1))
    _check(qkv, q_weight, k_weight, positions, rows, frequencies)
    if runs_triton(backend, qkv):
        return _QKNormRope.apply(qkv, q_weight, k_weight, positions, frequencies, heads, key_value_heads, float(theta), eps)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    rotation = torch.ops.sbp_kernels.rotation(positions, frequencies, qkv.shape[-1], float(theta), dtype)
    q, k, v = qkv.split([heads, key_value_heads, key_value_heads], 1)
    return _plain(q, q_weight, rotation, eps), _plain(k, k_weight, rotation, eps), v


def rotary_frequencies(inverse_frequencies: Tensor) -> Tensor:
    """Frequencies in radians a position, at most 1, as `qk_norm_rope` takes them: int64, in 2**-64 turns a position."""
    return (inverse_frequencies.double() * (2.0**64 / math.tau)).to(torch.int64)


class QKNormRope(nn.Module):
    """`qk_norm_rope` with its weights, named as Qwen3 names them: `q_norm.weight` and `k_norm.weight`."""

    def __init__(
        self,
        heads: int,
        key_value_heads: int,
        head_width: int,
        *,
        theta: float = 10000.0,
        eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.key_value_heads, self.theta, self.eps = heads, key_value_heads, theta, eps
        self.q_norm = nn.RMSNorm(head_width, eps, device=device, dtype=dtype)
        self.k_norm = nn.RMSNorm(head_width, eps, device=device, dtype=dtype)

    def forward(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [T, Hq, D], k and v [T, Hkv, D] of qkv [T, Hq + 2 Hkv, D] or [T, (Hq + 2 Hkv) * D]."""
        return qk_norm_rope(
            qkv,
            self.q_norm.weight,
            self.k_norm.weight,
            positions,
            heads=self.heads,
            key_value_heads=self.key_value_heads,
            theta=self.theta,
            eps=self.eps,
        )


class _QKNormRope(torch.autograd.Function):
    """Not an operation of its own, since an operation may not return v, a view of what it was given."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        positions: Tensor,
        frequencies: Tensor | None,
        heads: int,
        key_value_heads: int,
        theta: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, rstd = torch.ops.sbp_kernels.qk_norm_rope(
            qkv, q_weight, k_weight, positions, frequencies, heads, key_value_heads, theta, eps
        )
        ctx.save_for_backward(qkv, q_weight, k_weight, positions, frequencies, rstd)
        ctx.theta = theta
        return q, k, qkv[:, heads + key_value_heads :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_gradient: Tensor, k_gradient: Tensor, v_gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, *rest = ctx.saved_tensors
        gradients = torch.ops.sbp_kernels.qk_norm_rope_backward(
            q_gradient, k_gradient, v_gradient, qkv, q_weight, *rest, ctx.theta
        )
        weight_gradients = (None, None) if q_weight is None else gradients[1:]
        return gradients[0], *weight_gradients, *[None] * 6


def _plain(x: Tensor, weight: Tensor | None, rotation: tuple[Tensor, Tensor], eps: float) -> Tensor:
    cosine, sine = (table.unsqueeze(1) for table in rotation)
    wide = x.to(cosine.dtype)
    first, second = (wide if weight is None else plain_rms_norm(wide, weight, eps)).chunk(2, -1)
    rotated = [torch.addcmul(first * cosine, second, sine, value=-1), torch.addcmul(second * cosine, first, sine)]
    return torch.cat(rotated, -1).to(x.dtype)


def _check(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, positions: Tensor, rows: int, frequencies: Tensor | None
) -> None:
    width = qkv.shape[-1]
    if qkv.shape[1] != rows or width % 2:
        raise ValueError(f"qkv must be [T, heads + 2 * key_value_heads = {rows}, D] with D even: got {tuple(qkv.shape)}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight go together: give both, or None for both")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (weight.shape != (width,) or weight.device != qkv.device):
            raise ValueError(f"{name} must be [{width}] on {qkv.device}: got {tuple(weight.shape)} on {weight.device}")
    if positions.shape != qkv.shape[:1] or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions must be int32 [{qkv.shape[0]}]: got {positions.dtype} {tuple(positions.shape)}")
    if positions.device != qkv.device:
        raise ValueError(f"positions are on {positions.device}, qkv on {qkv.device}: move the layout with layout.to(...)")
    if frequencies is not None and (
        frequencies.shape != (width // 2,) or frequencies.dtype != torch.int64 or frequencies.device != qkv.device
    ):
        raise ValueError(f"frequencies must be int64 [{width // 2}] on {qkv.device}: make them with rotary_frequencies")


def frequencies_of(theta: float, head_width: int, device: torch.device) -> Tensor:
    """int64 [D / 2] of theta ** (-2 i / D), made on the device."""
    exponents = torch.arange(0, head_width, 2, device=device, dtype=torch.float64) / -head_width
    return rotary_frequencies(theta**exponents)


def rotation(
    positions: Tensor, frequencies: Tensor | None, head_width: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, D / 2]. Opaque to compilers, so that one graph computes them once for all of its layers."""
    if frequencies is None:
        frequencies = frequencies_of(theta, head_width, positions.device)
    turns = positions.long().unsqueeze(-1) * frequencies  # wraps round
    angles = (turns.double() * (math.tau / 2.0**64)).to(dtype)  # one rounding: two would double the error of the angle
    return angles.cos(), angles.sin()


def _fake_rotation(
    positions: Tensor, frequencies: Tensor | None, head_width: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (positions.shape[0], head_width // 2)
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)


def _fake_qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    frequencies: Tensor | None,
    heads: int,
    key_value_heads: int,
    theta: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, width = qkv.shape
    rstd_shape = (0,) if q_weight is None else (heads + key_value_heads, tokens)
    return (
        qkv.new_empty(tokens, heads, width),
        qkv.new_empty(tokens, key_value_heads, width),
        qkv.new_empty(rstd_shape, dtype=torch.float32),
    )


def _fake_qk_norm_rope_backward(
    q_gradient: Tensor,
    k_gradient: Tensor,
    v_gradient: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    frequencies: Tensor | None,
    rstd: Tensor,
    theta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = [qkv.new_empty(0) if weight is None else weight.new_empty(weight.shape) for weight in (q_weight, k_weight)]
    return qkv.new_empty(qkv.shape), weights[0], weights[1]


register_operation(
    "rotation(Tensor positions, Tensor? frequencies, int head_width, float theta, ScalarType dtype) -> (Tensor, Tensor)",
    rotation,
    _fake_rotation,
)
register_operation(
    "qk_norm_rope(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor positions, Tensor? frequencies, "
    "int heads, int key_value_heads, float theta, float eps) -> (Tensor, Tensor, Tensor)",
    "rope.triton.forward",
    _fake_qk_norm_rope,
)
register_operation(
    "qk_norm_rope_backward(Tensor q_gradient, Tensor k_gradient, Tensor v_gradient, Tensor qkv, Tensor? q_weight, "
    "Tensor? k_weight, Tensor positions, Tensor? frequencies, Tensor rstd, float theta) -> (Tensor, Tensor, Tensor)",
    "rope.triton.backward",
    _fake_qk_norm_rope_backward,
)
