"""Attention over a packed stream of segments.

The `torch` backend runs on every device: one scaled-dot-product call for each segment, over the keys that it sees, so
that no T x T mask or score matrix ever exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sbp_kernels.layout import PackedLayout

BACKENDS = ("auto", "torch")


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attention in which a token sees its own segment up to itself and all of its ancestors.

    Args:
        q: [T, Hq, D] queries of one packed stream.
        k: [T, Hkv, D] keys; Hq is a multiple of Hkv (grouped-query attention).
        v: [T, Hkv, D] values.
        layout: the segments; its length is T.
        scale: of the scores, D ** -0.5 by default.
        backend: "torch", or "auto", which today is "torch".

    Returns:
        [T, Hq, D] in the dtype of q; differentiable in q, k and v.

    Raises:
        ValueError: shapes, dtypes, devices or a layout that do not fit together; an unknown backend.
    """
    _check(q, k, v, layout, backend)
    return _segment_attention(q, k, v, layout, scale)


def _segment_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float | None) -> Tensor:
    # `split` has one backward for all of its pieces; slicing would allocate a T-long gradient for each segment
    queries, keys, values = (x.split(layout.lengths) for x in (q, k, v))
    outputs = []
    for segment, query in enumerate(queries):
        path = layout.path(segment)
        if len(path) == 1:
            key, value, mask = keys[segment], values[segment], None
        else:
            key, value = torch.cat([keys[i] for i in path]), torch.cat([values[i] for i in path])
            ones = torch.ones(len(query), len(key), dtype=torch.bool, device=q.device)
            mask = ones.tril_(len(key) - len(query))
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs) if outputs else torch.zeros_like(q)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    if q.dim() != 3 or k.dim() != 3 or v.shape != k.shape:
        found = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"q, k, v must be [T, heads, D], k and v alike: got {found}")
    if not len(q) == len(k) == len(layout):
        raise ValueError(f"q, k and layout differ in tokens: {len(q)}, {len(k)}, {len(layout)}")
    if q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        found = f"q has {q.shape[1]} heads of {q.shape[2]}, k {k.shape[1]} of {k.shape[2]}"
        raise ValueError(f"{found}: heads of q must be a multiple, widths equal")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError("q, k and v must share dtype and device")
