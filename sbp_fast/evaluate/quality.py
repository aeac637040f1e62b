"""Shares of bad documents with their intervals, and the measures of duplicates and copies that need no judge."""

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


def rate(bad: np.ndarray, how: str, real: np.ndarray | None = None, real_text: str = "") -> dict[str, Any]:
    """Return the share of bad documents with its 95% Wilson interval, and the same share among real documents.

    Args:
        bad: bool [documents], whether each document is bad.
        how: text that says what was counted, among which documents.
        real: bool, the same of real documents; None where there are none to compare with.
        real_text: name of the real documents.
    """
    if not len(bad):
        return unmeasured(how)
    interval = binomtest(int(bad.sum()), len(bad)).proportion_ci(method="wilson")
    return {
        "rate": float(bad.mean()),
        "low": float(interval.low),
        "high": float(interval.high),
        "documents": len(bad),
        "real_rate": float(real.mean()) if real is not None and len(real) else None,
        "real_documents": 0 if real is None else len(real),
        "real_text": real_text,
        "how": how,
    }


def unmeasured(how: str) -> dict[str, Any]:
    """Return the entry of a rate that was not measured; `how` says why."""
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
    """Return which texts have a near-duplicate: another text with shingles of Jaccard similarity `DUPLICATE_JACCARD` or more.

    The result is exact. With the shingles of all texts sorted by one order, two texts of that similarity share a shingle of
    their prefixes, the first 40% of each (prefix filter; Chaudhuri, Ganti and Kaushik 2006). Sorted by rarity, rarest first,
    common shingles rarely are in a prefix, so candidates are few.

    Args:
        bodies: tokens of each text.
        width: tokens of a shingle.

    Returns:
        bool [texts].
    """
    table = ShingleTable.build(bodies, width)
    sizes = np.diff(table.offsets)
    owners = np.repeat(np.arange(len(bodies)), sizes)
    _, group, texts = np.unique(table.hashes, return_inverse=True, return_counts=True)
    rarity = np.argsort(np.argsort(texts, kind="stable"))[group]
    order = np.lexsort((rarity, owners))
    rank = np.arange(len(owners)) - table.offsets[owners]
    prefix = sizes - np.ceil(DUPLICATE_JACCARD * sizes - 1e-6).astype(np.int64) + 1
    chosen = order[rank < prefix[owners]]
    chosen = chosen[texts[group[chosen]] > 1]
    chosen = chosen[np.lexsort((owners[chosen], rarity[chosen]))]
    return _alike(table.hashes, table.offsets, group[chosen], owners[chosen], DUPLICATE_JACCARD)


@njit(cache=True)
def _alike(hashes, offsets, groups, owners, similarity):  # type: ignore[no-untyped-def]
    """Return which texts have `similarity` to another text of a common group; entries of a group are adjacent."""
    alike = np.zeros(len(offsets) - 1, np.bool_)
    start = 0
    while start < len(groups):
        stop = start
        while stop < len(groups) and groups[stop] == groups[start]:
            stop += 1
        for a in range(start, stop):
            for b in range(a + 1, stop):
                first, second = owners[a], owners[b]
                if not (alike[first] and alike[second]) and _jaccard(hashes, offsets, first, second) >= similarity:
                    alike[first] = alike[second] = True
        start = stop
    return alike


@njit(cache=True)
def _jaccard(hashes, offsets, first, second):  # type: ignore[no-untyped-def]
    a, a_end, b, b_end = offsets[first], offsets[first + 1], offsets[second], offsets[second + 1]
    shared, total = 0, a_end - a + b_end - b
    while a < a_end and b < b_end:
        left, right = hashes[a], hashes[b]
        shared += left == right
        a += left <= right
        b += right <= left
    return shared / (total - shared)


def same_letters(prepared: PreparedCorpus, written: Corpus, documents: np.ndarray) -> np.ndarray:
    """Return which synthetic documents equal their seed except for white space and punctuation; bool [documents]."""
    seeds = written.column("seed")[documents]
    letters = {int(seed): _letters(prepared.text(prepared.unique, int(seed))) for seed in np.unique(seeds)}
    pairs = zip(documents.tolist(), seeds.tolist(), strict=True)
    return np.array([_letters(prepared.text(written, document)) == letters[seed] for document, seed in pairs], bool)


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text)
