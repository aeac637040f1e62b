"""How much of some documents occurs in a corpus of any size: memory holds their shingles, and the corpus is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.dedup.shingle_index import Batch, ShingleIndex, shingle_positions, slots_for

NOVEL_TOKENS = (2, 4, 8, 13)
NEW, KNOWN = 0, 1


def batch_of(documents: Sequence[np.ndarray]) -> Batch:
    """Return documents, <begin> and <end> included, as a batch for `ShingleIndex`."""
    tokens = np.concatenate([np.zeros(0, np.uint32), *documents]).astype(np.uint32)
    return tokens, np.cumsum([0, *map(len, documents)])


def known_counts(groups: Sequence[Batch], corpus: Corpus, width: int) -> list[np.ndarray]:
    """Return the number of distinct shingles of each document, and of those that occur in `corpus`.

    The table of shingles grows with `groups` alone, not with the corpus.

    Args:
        groups: batches of documents.
        corpus: corpus to compare with.
        width: tokens of a shingle.

    Returns:
        int64 [documents, 2] for each group.
    """
    positions = sum(shingle_positions(offsets, width) for _, offsets in groups)
    index = ShingleIndex(width, slots_for(positions))
    index.add(groups, NEW)
    index.mark(corpus.batches(), KNOWN)
    return [index.count(group)[:, [0, 1 + KNOWN]] for group in groups]


def known_share(counts: np.ndarray) -> np.ndarray:
    """Return the share of each document's shingles that are known, float64 [documents]; 0 for documents without shingles."""
    return counts[:, 1] / np.maximum(counts[:, 0], 1)


def novel_share(counts: np.ndarray) -> float | None:
    """Return the share of new shingles over all documents, each shingle counted once a document; None without shingles."""
    shingles, known = counts.sum(0).tolist()
    return 1 - known / shingles if shingles else None


def novel_rates(synthetic: list[np.ndarray], heldout: list[np.ndarray]) -> list[dict[str, Any]]:
    """Return, for each length in `NOVEL_TOKENS`, the share of runs of that many tokens that occur in no unique document.

    Args:
        synthetic: counts of synthetic documents (see `known_counts`), one array for each of `NOVEL_TOKENS`.
        heldout: the same of held-out documents.
    """
    rows = zip(NOVEL_TOKENS, synthetic, heldout, strict=True)
    return [
        {"tokens": tokens, "synthetic": novel_share(ours), "real_heldout": novel_share(real)} for tokens, ours, real in rows
    ]
