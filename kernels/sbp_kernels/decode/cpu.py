"""Decode attention on the CPU, by numba: each page is read once, for all rows that it serves.

The plain form gathers the pages, pads them to the longest and reads them again; this one takes a quarter to a tenth of its time
(docs/log.md), which is that of reading the pages. Nothing that a row computes depends on the other rows.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from torch import Tensor

from sbp_kernels.decode.layout import DecodeLayout

REORDER = {"contract", "reassoc", "nsz", "arcp"}  # sums in vector lanes; infinities stay what they are


def decode(q: Tensor, keys: Tensor, values: Tensor, layout: DecodeLayout, scale: float) -> Tensor:
    """`decode_attention` of float32 tensors on the CPU; see there for the arguments."""
    tables = (layout.seed_pages, layout.seed_tokens, layout.group_rows, layout.own_pages, layout.own_tokens)
    out = q.new_zeros(q.shape)
    _decode(q.contiguous().numpy(), keys.numpy(), values.numpy(), *[x.numpy() for x in tables], np.float32(scale), out.numpy())
    return out


@numba.njit(cache=True, nogil=True)
def _decode(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    seed_pages: np.ndarray,
    seed_tokens: np.ndarray,
    group_rows: np.ndarray,
    own_pages: np.ndarray,
    own_tokens: np.ndarray,
    scale: float,
    out: np.ndarray,
) -> None:
    rows, heads, width = q.shape
    largest = np.full((rows, heads), np.float32(-np.inf))
    normalizer = np.zeros((rows, heads), np.float32)
    scores = np.empty(keys.shape[2], np.float32)
    for group in range(len(seed_tokens)):
        if seed_tokens[group]:
            members = group_rows[group]
            _attend(q, keys, values, seed_pages[group], seed_tokens[group], members, scale, largest, normalizer, out, scores)
    own_row = np.empty(1, np.int32)
    for row in range(rows):
        if own_tokens[row]:
            own_row[0] = row
            _attend(q, keys, values, own_pages[row], own_tokens[row], own_row, scale, largest, normalizer, out, scores)
            for head in range(heads):
                for d in range(width):
                    out[row, head, d] /= normalizer[row, head]


@numba.njit(cache=True, nogil=True, fastmath=REORDER)
def _attend(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    pages: np.ndarray,
    tokens: int,
    rows: np.ndarray,
    scale: float,
    largest: np.ndarray,
    normalizer: np.ndarray,
    out: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Take `tokens` keys of `pages` into the online softmax (Milakov and Gimelshein 2018) of each of `rows`, -1 for none."""
    _, key_heads, page_tokens, width = keys.shape
    repeats = q.shape[1] // key_heads
    for first in range(0, tokens, page_tokens):
        page, count = pages[first // page_tokens], min(page_tokens, tokens - first)
        for key_head in range(key_heads):
            k, v = keys[page, key_head], values[page, key_head]
            for row in rows:
                for head in range(key_head * repeats, (key_head + 1) * repeats if row >= 0 else 0):
                    query, total, before = q[row, head], out[row, head], largest[row, head]
                    most = before
                    for j in range(count):
                        score = np.float32(0)
                        for d in range(width):
                            score += query[d] * k[j, d]
                        scores[j] = score * scale
                        most = max(most, scores[j])
                    shrink = math.exp(before - most)
                    largest[row, head] = most
                    for d in range(width):
                        total[d] *= shrink
                    added = np.float32(0)
                    for j in range(count):
                        weight = math.exp(scores[j] - most)
                        added += weight
                        for d in range(width):
                            total[d] += weight * v[j, d]
                    normalizer[row, head] = normalizer[row, head] * shrink + added
