"""Plain definitions in float64 with everything written out, for tests; never used in training."""

from __future__ import annotations

import torch
from torch import Tensor

from sbp_kernels.decode.layout import DecodeLayout
from sbp_kernels.layout import PackedLayout


def dense_mask(layout: PackedLayout) -> Tensor:
    """bool [T, T], True where query i (row) sees key j (column), read off the parents alone, not off `visible_until`."""
    if layout.lengths is None:
        raise ValueError("this layout was made on a device: its segments are not known on the host")
    segment_of = torch.repeat_interleave(torch.arange(len(layout.lengths)), torch.tensor(layout.lengths))
    sees = torch.zeros(len(layout.lengths), len(layout.lengths), dtype=torch.bool)
    for segment in range(len(layout.lengths)):
        sees[segment, layout.path(segment)] = True
    return sees[segment_of][:, segment_of].tril()


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float | None = None) -> Tensor:
    """Attention by its definition: q [T, Hq, D], k and v [T, Hkv, D], in float64; returns float64 [T, Hq, D]."""
    repeats = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(repeats, 1), v.double().repeat_interleave(repeats, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~dense_mask(layout).to(q.device), float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, layout: DecodeLayout, scale: float | None = None) -> Tensor:
    """Each row's newest token over its seed's tokens and its own, by dense softmax, in float64; [B, H, D]."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    repeats = q.shape[1] // keys.shape[1]
    for row, own_tokens in enumerate(layout.own_tokens.tolist()):
        if own_tokens == 0:
            continue
        group = int(layout.row_group[row])
        parts = (layout.seed_pages[group], int(layout.seed_tokens[group])), (layout.own_pages[row], own_tokens)
        k, v = (torch.cat([_first_tokens(cache, pages, count) for pages, count in parts], 1) for cache in (keys, values))
        scores = torch.einsum("hd,htd->ht", q[row].double(), k.repeat_interleave(repeats, 0)) * scale
        out[row] = torch.einsum("ht,htd->hd", scores.softmax(-1), v.repeat_interleave(repeats, 0))
    return out


def _first_tokens(cache: Tensor, pages: Tensor, count: int) -> Tensor:
    """[K, count, D] of the pages that hold so many tokens."""
    return cache.double()[pages[: -(-count // cache.shape[2])].long()].transpose(0, 1).flatten(1, 2)[:, :count]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    *,
    row_weight: Tensor | None = None,
    reduction: str = "sum",
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss by its definition, in float64; rows with `ignore_index` count nothing.

    Each other row has row_weight * (cross-entropy of the smoothed target + z_loss * log-sum-exp^2); "none" gives [T].
    """
    rows = (targets != ignore_index).nonzero().squeeze(1)
    logits = hidden[rows].double() @ weight.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    smoothed = torch.full_like(logits, label_smoothing / len(weight))
    smoothed[torch.arange(len(rows)), targets[rows]] += 1 - label_smoothing
    losses = -(smoothed * logits.log_softmax(-1)).sum(-1) + z_loss * logits.logsumexp(-1).square()
    weights = torch.ones_like(losses) if row_weight is None else row_weight[rows].double()
    if reduction == "none":
        return losses.new_zeros(len(targets)).index_put((rows,), losses * weights)
    return (losses * weights).sum() / (weights.sum() if reduction == "mean" else 1)


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """y [..., W] and x + residual, in float64."""
    total = x.double() if residual is None else x.double() + residual.double()
    return total / (total.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double(), total


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    heads: int,
    key_value_heads: int,
    rope_base: float = 10000.0,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, Hq, D], k and v [T, Hkv, D] of qkv [T, Hq + 2 Hkv, D], in float64.

    Numbers i and i + D/2 of a head turn as one complex number, by position * rope_base ** (-2 i / D) radians.
    """
    q, k, v = qkv.double().split([heads, key_value_heads, key_value_heads], 1)
    half = qkv.shape[-1] // 2
    frequencies = rope_base ** (torch.arange(half, dtype=torch.float64, device=qkv.device) / -half)
    angles = positions.double()[:, None, None] * frequencies
    turned = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        normed = x if weight is None else rms_norm(x, weight, epsilon=epsilon)[0]
        complex_numbers = torch.complex(normed[..., :half], normed[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        turned.append(torch.cat([complex_numbers.real, complex_numbers.imag], -1))
    return turned[0], turned[1], v


def swiglu(gate_up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up of gate_up [..., 2F], in float64."""
    gate, up = gate_up.double().chunk(2, -1)
    return gate * gate.sigmoid() * up


def swiglu_linear(gate_up: Tensor, down_weight: Tensor) -> Tensor:
    """[..., W], in float64."""
    return swiglu(gate_up) @ down_weight.double().T


def sampling_probabilities(
    logits: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0, forbidden: Tensor | None = None
) -> Tensor:
    """[B, V], how probable each token is to `sample_tokens`, token by token, in float64; temperature is positive."""
    allowed = logits.double() if forbidden is None else logits.double().index_fill(1, forbidden, float("-inf"))
    probabilities = (allowed / temperature).softmax(-1)
    kept = torch.zeros_like(probabilities)
    for row, ordered in enumerate(allowed.sort(descending=True, stable=True).indices.tolist()):
        left = ordered[: top_k or len(ordered)]
        whole, held = float(probabilities[row, left].sum()), 0.0
        for token in left:
            if top_p < 1 and held >= top_p * whole:
                break
            kept[row, token] = probabilities[row, token]
            held += float(probabilities[row, token])
    return kept / kept.sum(-1, keepdim=True)
