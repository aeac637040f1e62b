"""How much of some documents occurs in a whole corpus, however large that is: the corpus is read past their shingles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.dedup.shingle_index import Batch, ShingleIndex, shingle_positions, slots_for

NOVEL_TOKENS = (2, 4, 8, 13)
NEW, KNOWN = 0, 1


def batch_of(documents: Sequence[np.ndarray]) -> Batch:
    """Documents with their <begin> and <end> as `ShingleIndex` takes them."""
    tokens = np.concatenate([np.zeros(0, np.uint32), *documents]).astype(np.uint32)
    return tokens, np.cumsum([0, *map(len, documents)])


def known_counts(groups: Sequence[Batch], corpus: Corpus, width: int) -> list[np.ndarray]:
    """Of each document its distinct shingles, and those that occur in `corpus`; its table grows with `groups` alone.

    Returns:
        int64 [documents, 2] for each of the groups.
    """
    positions = sum(shingle_positions(offsets, width) for _, offsets in groups)
    index = ShingleIndex(width, slots_for(positions))
    index.add(groups, NEW)
    index.mark(corpus.batches(), KNOWN)
    return [index.count(group)[:, [0, 1 + KNOWN]] for group in groups]


def known_share(counts: np.ndarray) -> np.ndarray:
    """Of each document, the share of its shingles that are known; 0 where it is too short to have one. float64 [documents]"""
    return counts[:, 1] / np.maximum(counts[:, 0], 1)


def novel_share(counts: np.ndarray) -> float | None:
    """Of the shingles of all documents together, each counted once a document, the share that is new; None without any."""
    shingles, known = counts.sum(0).tolist()
    return 1 - known / shingles if shingles else None


def novel_rates(synthetic: list[np.ndarray], heldout: list[np.ndarray]) -> list[dict[str, Any]]:
    """For each of `NOVEL_TOKENS`, the share of runs of so many tokens that occur in no unique document.

    Args:
        synthetic, heldout: as `known_counts` gives them, one for each of `NOVEL_TOKENS`.
    """
    rows = zip(NOVEL_TOKENS, synthetic, heldout, strict=True)
    return [
        {"tokens": tokens, "synthetic": novel_share(ours), "real_heldout": novel_share(real)} for tokens, ours, real in rows
    ]
