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

HELD = 4096  # documents whose shingles are held at a time


def find_duplicates(written: Corpus, keys: Sequence[Path], width: int, similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """The documents that an earlier one which stays is so much like, and how much. int64 sorted, float64

    Equal documents are always met, others with the probability of `minhash.BANDS`. A candidate that goes itself is replaced
    by what it went for, so that one which stays stands for all that are like it. What is held grows with the pairs of
    candidates (see `banding.py`), not with the documents.

    Args:
        keys: files as `candidate_pairs` takes them.
        width: tokens of a shingle; a document of fewer has one, its whole.
    """

    @lru_cache(HELD)
    def shingles(place: int) -> np.ndarray:
        body = written[int(documents[place])][1:-1]
        return shingle_hashes(body, min(width, len(body)))

    pairs = candidate_pairs(keys).astype(np.int64)
    documents, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(pairs.shape)
    stays, alike = np.arange(len(documents)), np.zeros(len(documents))
    for pair in np.lexsort((pairs[:, 0], pairs[:, 1])).tolist():
        earlier, later = places[pair].tolist()
        if stays[later] == later:
            found = jaccard(shingles(int(stays[earlier])), shingles(later))
            if found >= similarity:
                stays[later], alike[later] = stays[earlier], found
    gone = stays != np.arange(len(documents))
    return documents[gone], alike[gone]
