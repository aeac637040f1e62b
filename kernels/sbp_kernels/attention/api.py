"""`packed_attention`: one function, one meaning, several ways to compute it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from sbp_kernels._tuned import provenance
from sbp_kernels.attention import cpu, flash_attn_4, fused, third_party  # noqa: F401 (which register their backends)
from sbp_kernels.attention.registry import find_backend
from sbp_kernels.layout import PackedLayout


@overload
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, *, softmax_scale: float | None = None, backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, *, softmax_scale: float | None = None, backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    softmax_scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which a token sees its own segment up to itself and all of its ancestors.

    Args:
        q: [T, Hq, D] queries of one packed sequence.
        k: [T, Hkv, D] keys; Hq is a multiple of Hkv (grouped-query attention).
        v: [T, Hkv, D] values.
        layout: the segments; its length is T and it is on the device of q.
        softmax_scale: factor of the scores, positive; D ** -0.5 by default.
        backend: see `resolve_backend`.
        return_lse: also return the natural log-sum-exp of each query's scaled scores.

    Returns:
        out [T, Hq, D] in the dtype of q, and with `return_lse` lse [Hq, T] in float32 (float64 for float64 input);
        both differentiable in q, k and v. The gradients of "triton" and "torch" are deterministic.

    Raises:
        ValueError: naming the argument that does not fit and what would.
    """
    backend = resolve_backend(backend, q.device)
    _check(q, k, v, layout)
    softmax_scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {softmax_scale}")
    out, lse = find_backend(backend).attend(q, k, v, layout, softmax_scale, return_lse)
    if not return_lse:
        return out
    if lse is None:
        raise ValueError(f"backend {backend!r} does not give lse: use 'triton', 'torch' or 'flex'")
    return out, lse


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """The name of the backend that `packed_attention` will use: a named one as it is, or what "auto" means on `device`.

    "triton" are this package's kernels, for CUDA tensors (and for any where TRITON_INTERPRET=1 is set, which is slow and for
    checking); "triton-hopper" has another forward kernel, see `hopper`. "torch" runs segment by segment on every
    device. "flex", "sdpa", "varlen", "flash-attn", "xformers" and "flash-attn-4" are what torch and other libraries have:
    see `third_party` and `flash_attn_4`. More are added by `register_attention_backend`. "auto" is "triton" on CUDA and
    "torch" elsewhere; `backend_provenance` says whether the kernels were measured on such a device.

    Raises:
        ValueError: an unknown backend, or one that cannot run on `device`.
    """
    device = torch.device(device)
    if backend == "auto":
        return "triton" if device.type == "cuda" else "torch"
    check_device = find_backend(backend).check_device
    if check_device is not None:
        check_device(device)
    return backend


def backend_provenance(backend: str, device: torch.device | str, head_width: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """Say on what a resolved backend's tiles and launches were chosen for heads of a width on a device.

    Returns:
        "measured on <device>" or "unmeasured" for "triton", whose table is `tuned.json`; "" for backends without a table.
    """
    return provenance(torch.device(device), head_width, dtype) if backend == "triton" else ""


def _check(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> None:
    if q.dim() != 3 or k.dim() != 3 or v.shape != k.shape:
        given = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"q, k, v must be [T, heads, D], k and v alike: got {given}")
    if not q.shape[0] == k.shape[0] == len(layout):
        raise ValueError(f"q, k and layout differ in tokens: {q.shape[0]}, {k.shape[0]}, {len(layout)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        given = f"q has {q.shape[1]} heads of {q.shape[2]}, k {k.shape[1]} of {k.shape[2]}"
        raise ValueError(f"{given}: heads of q must be a multiple, widths equal")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError("q, k and v must share dtype and device")
    if layout.visible_until.device != q.device:
        raise ValueError(f"layout is on {layout.visible_until.device}, q on {q.device}: use layout.to(q.device)")
