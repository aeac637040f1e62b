"""Attention in plain torch, segment by segment, on every device: the CPU's path, and a check elsewhere.

Each segment's keys are met twice: by the segment itself, causally, and by all of its descendants at once, which stand
behind it without a gap and see it whole. The two kinds of parts are merged by their log-sum-exp, so that no T x T mask or
score matrix ever exists. Segments are read off `visible_until`: shapes do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sbp_kernels._operands import dense
from sbp_kernels.attention.operations import Gradients, register_attention
from sbp_kernels.attention.registry import register_attention_backend
from sbp_kernels.layout import PackedLayout
from sbp_kernels.layout.plan import find_segments

FUSED_ON = ("cpu",)  # devices on which torch has one operation, with gradients, for a part
Part = tuple[slice, slice, bool, bool]  # queries, keys, whether causal, whether the first that these queries meet


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Compute out [T, Hq, D] and lse [Hq, T], differentiable. A layout on another device is copied to the host first."""
    return torch.ops.sbp_kernels.segment_attention(q, k, v, layout.visible_until, scale)


def _parts(visible_until: Tensor) -> Iterator[Part]:
    starts, ends, until, parents, _ = find_segments(visible_until.cpu().numpy())
    for start, end, last, parent in zip(starts.tolist(), ends.tolist(), until.tolist(), parents.tolist(), strict=True):
        keys = slice(start, end)
        yield keys, keys, True, parent < 0
        if end < last:
            yield slice(end, last), keys, False, parent < 0


def _forward(q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = dense(q), dense(k), dense(v)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=accumulate, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=accumulate, device=q.device)
    for queries, keys, causal, first in _parts(visible_until):
        part_out, part_lse = _attend(_heads(q[queries]), _heads(k[keys]), _heads(v[keys]), causal, scale)
        part_out, part_lse = part_out.squeeze(0).transpose(0, 1), part_lse.squeeze(0)
        if not first:
            merged = torch.logaddexp(lse[:, queries], part_lse)
            part_out = part_out * (part_lse - merged).exp().T.unsqueeze(-1)
            part_out += out[queries] * (lse[:, queries] - merged).exp().T.unsqueeze(-1)
            part_lse = merged
        out[queries], lse[:, queries] = part_out, part_lse
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
    for queries, keys, causal, first in _parts(visible_until):
        dout_part, q_part, out_part = (_heads(x[queries]) for x in (dout, q, out))
        k_part, v_part, lse_part = _heads(k[keys]), _heads(v[keys]), lse[:, queries].unsqueeze(0)
        dq_part, dk_part, dv_part = _differentiate_part(dout_part, q_part, k_part, v_part, out_part, lse_part, causal, scale)
        for total, part, rows, new in (dq, dq_part, queries, first), (dk, dk_part, keys, causal), (dv, dv_part, keys, causal):
            part = part.squeeze(0).transpose(0, 1)
            total[rows] = part if new else part + total[rows]
    return tuple(x[..., :width].to(q.dtype).contiguous() for x in (dq, dk, dv))  # type: ignore[return-value]


def _heads(x: Tensor) -> Tensor:
    """[rows, H, D] as [1, H, rows, D]."""
    return x.transpose(0, 1).unsqueeze(0)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [1, Hq, rows, D] and lse [1, Hq, rows] of q over k [1, Hkv, keys, D]."""
    if q.device.type in FUSED_ON:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp()
    return (weights @ v.unsqueeze(2).to(weights.dtype)).flatten(1, 2), lse.flatten(1, 2)


def _differentiate_part(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    """dq, dk and dv, shaped like q, k and v, of queries [1, Hq, rows, D] whose lse [1, Hq, rows] spans all of their keys."""
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
    """[1, Hkv, group, rows, keys], in float32 at least."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = q.unflatten(1, (k.shape[1], -1)).to(accumulate) @ k.unsqueeze(2).to(accumulate).mT * scale
    if causal:
        scores += torch.full(scores.shape[-2:], float("-inf"), dtype=accumulate, device=q.device).triu(1)
    return scores


register_attention("segment_attention", "Tensor visible_until, float scale", _forward, _backward)
register_attention_backend("torch", segment_attention, operations=["sbp_kernels::segment_attention"])
