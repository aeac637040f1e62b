"""Attention in plain torch, segment by segment, on every device: the CPU's path, and a check elsewhere.

The parts that a query meets (`parts.py`) are merged by their log-sum-exp, so that no T x T mask or score matrix ever exists.
Segments are read off `visible_until`: shapes do not depend on how many there are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sbp_kernels._operands import dense
from sbp_kernels.attention.operations import Gradients, register_attention
from sbp_kernels.attention.parts import find_parts
from sbp_kernels.attention.registry import register_attention_backend
from sbp_kernels.layout import PackedLayout

FUSED_ON = ("cpu",)  # devices on which torch has one operation, with gradients, for a part


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Compute out [T, Hq, D] and lse [Hq, T], differentiable. A layout on another device is copied to the host first."""
    return torch.ops.sbp_kernels.segment_attention(q, k, v, layout.visible_until, scale)


def _forward(q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = dense(q), dense(k), dense(v)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=accumulate, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=accumulate, device=q.device)
    for part in find_parts(visible_until):
        queries, keys = part.queries, part.keys
        part_out, part_lse = _attend(queries.take(q), keys.take(k), keys.take(v), part.causal, scale)
        if not part.first:
            earlier_out, earlier_lse = queries.take(out), queries.take(lse.T)
            merged = torch.logaddexp(earlier_lse, part_lse)
            part_out = part_out * (part_lse - merged).exp().unsqueeze(-1)
            part_out += earlier_out * (earlier_lse - merged).exp().unsqueeze(-1)
            part_lse = merged
        queries.put(out, part_out)
        queries.put(lse.T, part_lse)
    return out.to(q.dtype), lse


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible_until: Tensor,
    scale: float,
) -> Gradients:  # fmt: skip
    """Each part's gradients follow from the merged log-sum-exp and output (FlashAttention-2, algorithm 2)."""
    width = q.shape[-1]
    if dlse is not None:  # one more channel: its value is 1, its output's gradient dlse, and it takes no part in dO * O
        q, k, out = (F.pad(x, (0, 1)) for x in (q, k, out))
        v, dout = F.pad(v, (0, 1), value=1.0), torch.cat([dout, dlse.T.unsqueeze(-1).to(dout.dtype)], -1)
    dout, q, k, v = dense(dout), dense(q), dense(k), dense(v)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.empty(x.shape, dtype=accumulate, device=x.device) for x in (q, k, v))
    for part in find_parts(visible_until):
        queries, keys = part.queries, part.keys
        dout_part, q_part, out_part, lse_part = (queries.take(x) for x in (dout, q, out, lse.T))
        dq_part, dk_part, dv_part = _differentiate_part(
            dout_part, q_part, keys.take(k), keys.take(v), out_part, lse_part, part.causal, scale
        )
        queries.put(dq, dq_part if part.first else dq_part + queries.take(dq))
        for total, gradient in (dk, dk_part), (dv, dv_part):
            keys.put(total, gradient if part.causal else gradient + keys.take(total))
    return tuple(x[..., :width].to(q.dtype).contiguous() for x in (dq, dk, dv))  # type: ignore[return-value]


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [N, Hq, rows, D] and lse [N, Hq, rows] of q over k [N, Hkv, keys, D]."""
    if q.device.type in FUSED_ON:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp()
    return (weights @ v.unsqueeze(2).to(weights.dtype)).flatten(1, 2), lse.flatten(1, 2)


def _differentiate_part(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    """dq, dk and dv, shaped like q, k and v, of queries [N, Hq, rows, D] whose lse [N, Hq, rows] spans all of their keys."""
    if q.device.type in FUSED_ON:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    group = (k.shape[1], -1)
    weights = (_scores(q, k, causal, scale) - lse.unflatten(1, group).unsqueeze(-1)).exp()
    q, dout, out = (x.unflatten(1, group).to(weights.dtype) for x in (q, dout, out))
    k, v = (x.unsqueeze(2).to(weights.dtype) for x in (k, v))
    dscores = weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    return (dscores @ k).flatten(1, 2), (dscores.mT @ q).sum(2), (weights.mT @ dout).sum(2)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[N, Hkv, group, rows, keys], in float32 at least."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = q.unflatten(1, (k.shape[1], -1)).to(accumulate) @ k.unsqueeze(2).to(accumulate).mT * scale
    if causal:
        scores += torch.full(scores.shape[-2:], float("-inf"), dtype=accumulate, device=q.device).triu(1)
    return scores


register_attention("segment_attention", "Tensor visible_until, float scale", _forward, _backward)
register_attention_backend("torch", segment_attention, operations=["sbp_kernels::segment_attention"])
