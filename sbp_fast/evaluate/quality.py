"""Shares of documents with their intervals, and the measures behind them that need no judge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from scipy.stats import binomtest

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.dedup.shingles import ShingleTable

DUPLICATE_JACCARD = 0.6


def rate(found: np.ndarray, how: str, real: np.ndarray | None = None, real_text: str = "") -> dict[str, Any]:
    """The share of True in `found` with its 95% Wilson interval, and the same share among real documents.

    Args:
        how: what was counted, among which documents.
        real_text: which real documents those of `real` are.
    """
    if not len(found):
        return unmeasured(how)
    interval = binomtest(int(found.sum()), len(found)).proportion_ci(method="wilson")
    return {
        "rate": float(found.mean()),
        "low": float(interval.low),
        "high": float(interval.high),
        "documents": len(found),
        "real_rate": float(real.mean()) if real is not None and len(real) else None,
        "real_documents": 0 if real is None else len(real),
        "real_text": real_text,
        "how": how,
    }


def unmeasured(how: str) -> dict[str, Any]:
    """A rate that is not known, and why."""
    return {
        "rate": None,
        "low": None,
        "high": None,
        "documents": 0,
        "real_rate": None,
        "real_documents": 0,
        "real_text": "",
        "how": how,
    }


def near_duplicates(bodies: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Which texts have a Jaccard similarity of at least `DUPLICATE_JACCARD`, over their shingles, to another. bool [texts]

    Exact: if the shingles of each text are put in one order, two sets so alike share one of those before each one's last 60%
    (prefix filter; Chaudhuri, Ganti and Kaushik 2006). The order is the rarest first, so that what stands in many texts
    makes few of them candidates.
    """
    table = ShingleTable.build(bodies, width)
    sizes = np.diff(table.offsets)
    owners = np.repeat(np.arange(len(bodies)), sizes)
    _, group, texts = np.unique(table.hashes, return_inverse=True, return_counts=True)
    rarity = np.argsort(np.argsort(texts, kind="stable"))[group]
    order = np.lexsort((rarity, owners))
    place = np.arange(len(owners)) - table.offsets[owners]
    prefix = sizes - np.ceil(DUPLICATE_JACCARD * sizes - 1e-6).astype(np.int64) + 1
    chosen = order[place < prefix[owners]]
    chosen = chosen[texts[group[chosen]] > 1]
    chosen = chosen[np.lexsort((owners[chosen], rarity[chosen]))]
    return _alike(table.hashes, table.offsets, group[chosen], owners[chosen], DUPLICATE_JACCARD)


@njit(cache=True)
def _alike(hashes, offsets, groups, owners, similarity):  # type: ignore[no-untyped-def]
    """Which texts are so much like another one of a group they are both in; groups stand one after the other."""
    found = np.zeros(len(offsets) - 1, np.bool_)
    start = 0
    while start < len(groups):
        stop = start
        while stop < len(groups) and groups[stop] == groups[start]:
            stop += 1
        for a in range(start, stop):
            for b in range(a + 1, stop):
                first, second = owners[a], owners[b]
                if not (found[first] and found[second]) and _jaccard(hashes, offsets, first, second) >= similarity:
                    found[first] = found[second] = True
        start = stop
    return found


@njit(cache=True)
def _jaccard(hashes, offsets, first, second):  # type: ignore[no-untyped-def]
    a, a_end, b, b_end = offsets[first], offsets[first + 1], offsets[second], offsets[second + 1]
    shared, both = 0, a_end - a + b_end - b
    while a < a_end and b < b_end:
        left, right = hashes[a], hashes[b]
        shared += left == right
        a += left <= right
        b += right <= left
    return shared / (both - shared)


def same_letters(prepared: PreparedCorpus, written: Corpus, documents: np.ndarray) -> np.ndarray:
    """Which of some synthetic documents equal their seed but for white space and punctuation. bool [documents]"""
    seeds = written.column("seed")[documents]
    letters = {int(seed): _letters(prepared.text(prepared.unique, int(seed))) for seed in np.unique(seeds)}
    pairs = zip(documents.tolist(), seeds.tolist(), strict=True)
    return np.array([_letters(prepared.text(written, document)) == letters[seed] for document, seed in pairs], bool)


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text)
