"""Drawing tokens: temperature and top-p by inverse transform, one explicit uniform a token.

The uniforms come from a counter-based generator keyed by run seed, seed document and sample number, so that a document's
randomness does not depend on the batch it sat in.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FIRST_CANDIDATES = 128


def document_uniforms(run_seed: int, document: int, sample: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): the stream of one sample of one seed document (Philox; Salmon et al. 2011)."""
    key = np.array([run_seed, document], dtype=np.int64).view(np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, sample])).random(count)


def sample(logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw one token a row from softmax(logits / temperature) cut to its nucleus.

    The nucleus is the smallest set of most probable tokens that holds `top_p` of the probability (Holtzman et al. 2020,
    section 3.1). The draw inverts the cumulative distribution over the nucleus in order of falling probability; among equal
    probabilities the order is unspecified, as for `torch.topk`. Only as many tokens are sorted as a row's nucleus needs.

    Args:
        logits_BV: float; -inf where a token must not be drawn.
        uniforms_B: float64 in [0, 1).
        temperature: positive.
        top_p: in (0, 1].

    Returns:
        int64 [B] token ids.
    """
    probabilities_BV = (logits_BV / temperature).softmax(-1)
    if top_p == 1:  # every token is in, their order does not matter
        return _invert(probabilities_BV.cumsum(-1, dtype=torch.float64), uniforms_B, 1.0)
    return _draw(probabilities_BV, uniforms_B, top_p, FIRST_CANDIDATES)


def _draw(probabilities_BV: Tensor, uniforms_B: Tensor, top_p: float, candidates: int) -> Tensor:
    vocabulary = probabilities_BV.shape[1]
    sorted_BC, ids_BC = probabilities_BV.topk(min(candidates, vocabulary))
    cumulative_BC = sorted_BC.cumsum(-1, dtype=torch.float64)
    drawn_B = ids_BC.gather(1, _invert(cumulative_BC, uniforms_B, top_p).unsqueeze(1)).squeeze(1)
    wide = (cumulative_BC[:, -1] < top_p).nonzero().squeeze(1)  # rows whose nucleus goes on beyond the candidates
    if candidates < vocabulary and len(wide):
        drawn_B[wide] = _draw(probabilities_BV[wide], uniforms_B[wide], top_p, 8 * candidates)
    return drawn_B


def _invert(cumulative_BC: Tensor, uniforms_B: Tensor, mass: float) -> Tensor:
    """Index [B] at which each row's running sum passes `uniform` times the sum of the shortest prefix that holds `mass`."""
    reached_B1 = cumulative_BC[:, -1:].clamp(max=mass)  # rounding may leave the whole row short of 1
    last_B1 = (cumulative_BC < reached_B1).sum(-1, keepdim=True)
    target_B1 = uniforms_B.unsqueeze(1) * cumulative_BC.gather(1, last_B1)
    return (cumulative_BC <= target_B1).sum(-1).minimum(last_B1.squeeze(1))
