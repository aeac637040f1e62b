"""Overlap of documents with their seeds, by shingles."""

from __future__ import annotations

import numpy as np
from numba import njit

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.dedup.shingles import window_hashes


def compare_with_seeds(
    prepared: PreparedCorpus, seeds: np.ndarray, tokens: np.ndarray, offsets: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the repeated share and the seed containment of documents, float64 [documents] each.

    The first is the share of shingle positions whose shingle occurs more than once in the document, the second the share of
    distinct shingles that occur in its seed.

    Args:
        prepared: the corpus that the seeds are in.
        seeds: int64 [documents], the seed of each document; -1 for a document without one, which has nothing in common with it.
        tokens: uint32 [tokens], the documents concatenated, with <begin> and <end>.
        offsets: int64 [documents + 1].
        width: tokens of a shingle.
    """
    distinct_seeds, owner = np.unique(seeds, return_inverse=True)
    nothing = np.zeros(2, prepared.unique.dtype)  # a document's first and last token are not compared
    texts = [nothing if seed < 0 else prepared.unique[int(seed)] for seed in distinct_seeds]
    seed_offsets = np.cumsum([0, *map(len, texts)])
    seed_tokens = np.concatenate([np.zeros(0, np.uint32), *texts]).astype(np.uint32)
    return _compare(tokens, offsets, seed_tokens, seed_offsets, owner.astype(np.int64), width)


@njit(cache=True)
def _sorted_hashes(tokens, offsets, text, width):  # type: ignore[no-untyped-def]
    body = tokens[offsets[text] + 1 : offsets[text + 1] - 1]
    return np.sort(window_hashes(body, width)) if len(body) >= width else np.zeros(0, np.uint64)


@njit(cache=True)
def _compare(tokens, offsets, seed_tokens, seed_offsets, owner, width):  # type: ignore[no-untyped-def]
    texts, last = len(offsets) - 1, -1
    repeated_share, seed_containment = np.zeros(texts), np.zeros(texts)
    seed = np.zeros(0, np.uint64)
    for text in range(texts):
        hashes = _sorted_hashes(tokens, offsets, text, width)
        if len(hashes) == 0:
            continue
        if owner[text] != last:
            last = owner[text]
            seed = _sorted_hashes(seed_tokens, seed_offsets, last, width)
        distinct = repeated = shared = start = 0
        while start < len(hashes):
            end = start + 1
            while end < len(hashes) and hashes[end] == hashes[start]:
                end += 1
            match = np.searchsorted(seed, hashes[start])
            distinct += 1
            shared += match < len(seed) and seed[match] == hashes[start]
            repeated += end - start if end - start > 1 else 0
            start = end
        repeated_share[text], seed_containment[text] = repeated / len(hashes), shared / distinct
    return repeated_share, seed_containment
