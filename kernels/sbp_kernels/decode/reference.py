"""Decode attention by its definition in float64, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from sbp_kernels.decode.layout import DecodeLayout


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, layout: DecodeLayout, softmax_scale: float | None = None
) -> Tensor:
    """Attention of each row's newest token over its seed's tokens and its own, by dense softmax; float64 [B, H, D]."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    softmax_scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    repeats = q.shape[1] // keys.shape[1]
    for row, own_tokens in enumerate(layout.own_tokens.tolist()):
        if own_tokens == 0:
            continue
        group = int(layout.row_group[row])
        parts = (layout.seed_pages[group], int(layout.seed_tokens[group])), (layout.own_pages[row], own_tokens)
        k, v = (torch.cat([_first_tokens(cache, pages, count) for pages, count in parts], 1) for cache in (keys, values))
        scores = torch.einsum("hd,htd->ht", q[row].double(), k.repeat_interleave(repeats, 0)) * softmax_scale
        out[row] = torch.einsum("ht,htd->hd", scores.softmax(-1), v.repeat_interleave(repeats, 0))
    return out


def _first_tokens(cache: Tensor, pages: Tensor, count: int) -> Tensor:
    """[K, count, D] of the pages that hold so many tokens."""
    return cache.double()[pages[: -(-count // cache.shape[2])].long()].transpose(0, 1).flatten(1, 2)[:, :count]
