"""The search for related pairs among the held-out documents, by the criteria of the real pairs and in their band."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np

from sbp_fast.config import PairConfig, RunConfig, resolve_threads
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.shuffle import hash_name
from sbp_fast.neighbors.exact import ExactSearcher
from sbp_fast.neighbors.top_k import NO_NEIGHBOR
from sbp_fast.neighbors.vectors import Vectors, similarities
from sbp_fast.pairs.candidates import Candidates
from sbp_fast.pairs.criteria import ACCEPTED, TAKEN, apply_caps, rank_in_seed
from sbp_fast.pairs.document_statistics import DistinctDocuments, hashed_originals
from sbp_fast.pairs.heldout_pairs import MAXIMUM_DOCUMENTS, MINIMUM_PAIRS, NO_SEED, HeldoutPairs, PairSplit, assign_other_seeds
from sbp_fast.pipeline.progress import Console


def find_heldout_pairs(
    config: RunConfig, prepared: PreparedCorpus, vectors: Path, low: float, folder: Path, console: Console
) -> tuple[HeldoutPairs, dict[str, Any]]:
    """Find the related pairs within each split of the held-out documents, validation and test.

    Args:
        config: its `pair`, `seed` and `threads`.
        prepared: the corpus.
        vectors: output of `embed`.
        low: lower end of the band of the real pairs.
        folder: for temporary files.
        console: says how many there are.

    Returns:
        The pairs, by split, seed, falling similarity and partner; and for each split the counts `documents`, `searched` (at
        most `MAXIMUM_DOCUMENTS`), `pairs`, `without_other_seed`, and `too_few` if these are less than `MINIMUM_PAIRS`.
    """
    parts, counts = [], {}
    for split in get_args(PairSplit):
        rows: np.ndarray = getattr(prepared, split)
        searched = _hash_chosen(prepared, rows, config.seed)
        pairs = _find(config, prepared, vectors, searched, split, low, folder)
        without, too_few = int((pairs.other_seeds == NO_SEED).sum()), len(pairs) < MINIMUM_PAIRS
        counts[split] = {"documents": len(rows), "searched": len(searched), "pairs": len(pairs)}
        counts[split] |= {"without_other_seed": without, "too_few": too_few}
        remark = f", too few (less than {MINIMUM_PAIRS}) to measure a relation by" if too_few else ""
        console.say(f"{len(pairs)} pairs of held-out documents for {split}, among {len(searched)} documents{remark}")
        parts.append(pairs)
    return HeldoutPairs.concatenate(parts), counts


def _hash_chosen(prepared: PreparedCorpus, rows: np.ndarray, seed: int) -> np.ndarray:
    """Return at most `MAXIMUM_DOCUMENTS` of the rows, those whose hashed ids are least, ascending."""
    if len(rows) <= MAXIMUM_DOCUMENTS:
        return rows
    keys = np.array([hash_name(str(id), seed) for id in prepared.heldout.ids[rows]], np.uint64)
    return np.sort(rows[np.argsort(keys, kind="stable")[:MAXIMUM_DOCUMENTS]])


def _find(
    config: RunConfig, prepared: PreparedCorpus, directory: Path, rows: np.ndarray, split: PairSplit, low: float, folder: Path
) -> HeldoutPairs:
    """Return the pairs among the held-out documents `rows`, all of one split, with the other seeds."""
    if len(rows) < 2:
        empty = np.zeros(0, np.int64)
        return HeldoutPairs(empty, empty, empty.astype(np.float32), empty.astype(str), empty)
    vectors = Vectors(directory, hashed=False, split="heldout", corpus=prepared.heldout)
    documents = DistinctDocuments.among(prepared, vectors, rows, config.pair, folder)
    seeds, partners, scores = _qualifying(documents, low, config.pair, resolve_threads(config))
    taken = _capped(seeds, partners, scores, len(documents), config.pair)
    seeds, partners, scores = documents.rows[seeds[taken]], documents.rows[partners[taken]], scores[taken]

    originals, ids = hashed_originals(prepared, prepared.heldout), prepared.heldout.ids

    def unrelated(seeds: np.ndarray, partners: np.ndarray) -> np.ndarray:
        return (originals[seeds] != originals[partners]) & (similarities(vectors, seeds, partners) < low)

    names = (f"{ids[seed]}\n{ids[partner]}" for seed, partner in zip(seeds.tolist(), partners.tolist(), strict=True))
    keys = np.array([hash_name(name, config.seed) for name in names], np.uint64)
    others = assign_other_seeds(seeds, partners, unrelated, keys)
    return HeldoutPairs(seeds, partners, scores, np.full(len(seeds), split), others)


def _qualifying(
    documents: DistinctDocuments, low: float, config: PairConfig, threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return seeds, partners and similarities of all pairs that no criterion rejects, in both directions."""
    searcher = ExactSearcher(documents.vectors[np.arange(len(documents))], threads=threads)
    neighbors, _ = searcher.search(np.arange(len(documents)), config.neighbors)
    present = neighbors != NO_NEIGHBOR
    own, others = np.nonzero(present)[0], neighbors[present]
    keys = np.unique(np.minimum(own, others) * len(documents) + np.maximum(own, others))
    candidates = Candidates.measure(documents, keys // len(documents), keys % len(documents), low)
    accepted = candidates.reject_reasons(low, config) == ACCEPTED
    first, second, scores = candidates.first[accepted], candidates.second[accepted], candidates.scores[accepted]
    return np.append(first, second), np.append(second, first), np.tile(scores, 2)


def _capped(seeds: np.ndarray, partners: np.ndarray, scores: np.ndarray, documents: int, config: PairConfig) -> np.ndarray:
    """Return indices of the pairs that the degree caps leave (see `caps.py`), by seed, falling similarity, partner."""
    by_seed = np.lexsort((partners, -scores, seeds))
    rank = np.empty_like(seeds)
    rank[by_seed] = rank_in_seed(seeds[by_seed])
    turns = np.lexsort((partners, seeds, -scores, rank))
    counts = np.zeros((2, documents), np.int32)
    outcome = apply_caps(seeds[turns], partners[turns], *counts, config.partners_per_seed, config.seeds_per_partner)
    taken = np.zeros(len(seeds), bool)
    taken[turns] = outcome == TAKEN
    return by_seed[taken[by_seed]]
