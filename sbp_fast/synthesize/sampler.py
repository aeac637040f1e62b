"""Drawing tokens: temperature and top-p by inverse transform, one explicit uniform a token.

The uniforms come from a counter-based generator keyed by run seed, seed document and sample number, so that a document's
randomness does not depend on the batch it sat in.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

BIN_SHIFT = 19  # of a float32's bits: a bin for each sixteenth of a power of two
BINS = (0x3F800000 >> BIN_SHIFT) + 1  # 0x3F800000 is 1.0


def document_uniforms(run_seed: int, document: int, sample: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): the stream of one sample of one seed document (Philox; Salmon et al. 2011)."""
    key = np.array([run_seed, document], dtype=np.int64).view(np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, sample])).random(count)


def sample(logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw one token a row from softmax(logits / temperature) cut to its nucleus.

    The nucleus is the smallest set of most probable tokens that holds `top_p` of the probability (Holtzman et al. 2020,
    section 3.1); of equal tokens at its edge, those with lower ids are in. The draw inverts the cumulative distribution over
    the nucleus in the order of ids.

    Args:
        logits_BV: float32; -inf where a token must not be drawn.
        uniforms_B: float64 in [0, 1).
        temperature: positive.
        top_p: in (0, 1].

    Returns:
        int64 [B] token ids.
    """
    probabilities_BV = (logits_BV / temperature).softmax(-1)
    mass = top_p if top_p < 1 else np.inf  # everything, whatever rounding does to the sum
    if logits_BV.device.type != "cpu":
        return draw_by_sorting(probabilities_BV, uniforms_B, mass)
    return torch.from_numpy(_draw_by_bins(probabilities_BV.numpy(), uniforms_B.numpy(), mass))


def draw_by_sorting(probabilities_BV: Tensor, uniforms_B: Tensor, mass: float) -> Tensor:
    """`sample` by its definition, from the probabilities; for any device."""
    sorted_BV, ids_BV = probabilities_BV.sort(descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1, dtype=torch.float64) - sorted_BV
    nucleus_BV = torch.zeros_like(probabilities_BV).scatter_(1, ids_BV, sorted_BV * (before_BV < mass))
    cumulative_BV = nucleus_BV.cumsum(-1, dtype=torch.float64)
    whole_B1 = cumulative_BV[:, -1:]
    passed_B = (cumulative_BV <= uniforms_B.unsqueeze(1) * whole_B1).sum(-1)
    return passed_B.minimum((cumulative_BV < whole_B1).sum(-1))


@numba.njit(cache=True, nogil=True)  # batches are drawn side by side
def _draw_by_bins(probabilities: np.ndarray, uniforms: np.ndarray, mass: float) -> np.ndarray:
    """The same without sorting a row: the nucleus ends in one bin of nearly equal probabilities, and only that is sorted."""
    rows, vocabulary = probabilities.shape
    bits = probabilities.view(np.uint32)  # orders as the numbers do, none being negative
    drawn = np.zeros(rows, np.int64)
    for row in range(rows):
        bins = np.zeros(BINS)
        for token in range(vocabulary):
            bins[bits[row, token] >> BIN_SHIFT] += probabilities[row, token]
        held, edge_bin = 0.0, BINS - 1
        while edge_bin > 0 and held + bins[edge_bin] < mass:
            held += bins[edge_bin]
            edge_bin -= 1
        edge_tokens = np.flatnonzero(bits[row] >> BIN_SHIFT == edge_bin)
        last, edge = vocabulary, np.float32(0)
        for place in np.argsort(-probabilities[row, edge_tokens], kind="mergesort"):  # stable: lower ids first
            last = edge_tokens[place]
            edge = probabilities[row, last]
            held += edge
            if held >= mass:
                break
        target, running = uniforms[row] * held, 0.0
        for token in range(vocabulary):
            probability = probabilities[row, token]
            if probability > edge or (probability == edge and token <= last and edge > 0):
                running += probability
                drawn[row] = token
                if running > target:
                    break
    return drawn
