"""The distribution that `sample_tokens` samples from, in float64, for tests."""

from __future__ import annotations

import torch
from torch import Tensor


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
