"""Near-duplicates among synthetic documents: candidates by MinHash, confirmed by exact Jaccard similarity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.dedup.lsh import candidate_pairs
from sbp_fast.dedup.minhash import jaccard
from sbp_fast.dedup.shingles import shingle_hashes

CACHED_DOCUMENTS = 4096
"""Documents whose shingles are in memory at a time."""


def find_duplicates(synthetic: Corpus, keys: Sequence[Path], width: int, similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the documents that are near-duplicates of an earlier document that is not itself one.

    Equal documents always become candidates, others with the probability of `minhash.BANDS`. A candidate that is itself a
    duplicate is replaced by the document that it duplicates, so that one document stands for its whole cluster. Memory grows
    with the candidate pairs (see `dedup/lsh.py`), not with the documents.

    Args:
        synthetic: all documents.
        keys: files as `candidate_pairs` takes them.
        width: tokens of a shingle; a shorter document is one shingle.
        similarity: least Jaccard similarity of duplicates; above 1 there are none.

    Returns:
        int64 [duplicates], sorted indices of documents; and float64 [duplicates], their similarity to the earlier document.
    """
    if similarity > 1:
        return np.zeros(0, np.int64), np.zeros(0)

    @lru_cache(CACHED_DOCUMENTS)
    def shingles(position: int) -> np.ndarray:
        body = synthetic[int(documents[position])][1:-1]
        return shingle_hashes(body, min(width, len(body)))

    pairs = candidate_pairs(keys).astype(np.int64)
    documents, positions = np.unique(pairs, return_inverse=True)
    positions = positions.reshape(pairs.shape)
    representatives, similarities = np.arange(len(documents)), np.zeros(len(documents))
    for pair in np.lexsort((pairs[:, 0], pairs[:, 1])).tolist():
        earlier, later = positions[pair].tolist()
        if representatives[later] == later:
            measured = jaccard(shingles(int(representatives[earlier])), shingles(later))
            if measured >= similarity:
                representatives[later], similarities[later] = representatives[earlier], measured
    duplicate = representatives != np.arange(len(documents))
    return documents[duplicate], similarities[duplicate]
