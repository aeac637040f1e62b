"""Degree caps: no seed has too many partners and no partner too many seeds.

Every seed gets its best partner before any gets its second. Otherwise the most similar few would fill the popular partners,
and seeds that have no other would get none. Among pairs of one rank within their seeds the more similar come first. Memory
holds two counts of each document and the pairs of one rank at a time, which are one of each seed at most.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sbp_fast.data.external_sort import read_all_between, write_rows
from sbp_fast.pairs.criteria import PARTNER_FULL, SEED_FULL, TAKEN, apply_caps, rank_in_seed
from sbp_fast.pairs.score import DIRECTED
from sbp_fast.pairs.tasks import NEIGHBOR_BYTES, Pairing
from sbp_fast.pipeline.executors.executor import Advance
from sbp_fast.pipeline.seals import seal

RANKED = np.dtype([("rank", "<i8"), *DIRECTED.descr])


def write_ranks(pairing: Pairing, number: int, advance: Advance) -> None:
    """Write the ordered pairs whose seed is in a range, sorted by their rank within it, and the number of each rank."""
    rows = read_all_between(pairing.files("directed"), DIRECTED, "seed", *pairing.ranges[number])
    rows = rows[np.lexsort((rows["partner"], -rows["score"], rows["seed"]))]
    rank = rank_in_seed(rows["seed"])
    columns = {name: rows[name] for name in DIRECTED.names or ()}
    write_rows(pairing.file("ranked", number), RANKED, np.argsort(rank, kind="stable"), rank=rank, **columns)
    sizes = np.bincount(rank)
    write_rows(pairing.file("sizes", number), np.dtype([("pairs", "<i8")]), pairs=sizes)
    seal(pairing.file("sizes", number), pairing.file("ranked", number))  # last: it marks the range as done


def cap_degrees(pairing: Pairing) -> dict[str, int]:
    """Take pairs rank by rank and write them; return how many each cap dropped."""
    partner_counts, seed_counts = (np.zeros(len(pairing.documents), np.int32) for _ in range(2))
    dropped = {"seed_cap": 0, "partner_cap": 0}
    caps = pairing.settings.partners_per_seed, pairing.settings.seeds_per_partner
    for batch, (low, high) in enumerate(_batches(pairing)):
        rows = read_all_between(pairing.files("ranked"), RANKED, "rank", low, high)
        rows = rows[np.lexsort((rows["partner"], rows["seed"], -rows["score"], rows["rank"]))]
        seeds, partners = rows["seed"].copy(), rows["partner"].copy()
        outcome = apply_caps(seeds, partners, partner_counts, seed_counts, *caps)
        dropped["seed_cap"] += int((outcome == SEED_FULL).sum())
        dropped["partner_cap"] += int((outcome == PARTNER_FULL).sum())
        taken = rows[outcome == TAKEN]
        taken = taken[np.argsort(taken["seed"], kind="stable")]
        write_rows(pairing.file("taken", batch), DIRECTED, **{name: taken[name] for name in DIRECTED.names or ()})
    return dropped


def taken_pairs(pairing: Pairing) -> Iterator[np.ndarray]:
    """Yield the pairs that `cap_degrees` took, DIRECTED, by (seed, falling score, partner), a range of seeds at a time."""
    files = [pairing.file("taken", batch) for batch in range(len(_batches(pairing)))]
    for low, high in pairing.ranges:
        rows = read_all_between(files, DIRECTED, "seed", low, high)
        yield rows[np.lexsort((rows["partner"], -rows["score"], rows["seed"]))]


def _batches(pairing: Pairing) -> list[tuple[int, int]]:
    """Half-open ranges of ranks to take at once: as many as the memory holds."""
    sizes = [np.load(file)["pairs"] for file in pairing.files("sizes")]
    total = np.zeros(max(map(len, sizes)), np.int64)
    for size in sizes:
        total[: len(size)] += size
    ends, capacity = np.cumsum(total), int(pairing.settings.memory_gib * 2**30) // NEIGHBOR_BYTES
    batches, low = [], 0
    while low < len(total):
        done = ends[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(ends, done + capacity, "right")))
        batches.append((low, high))
        low = high
    return batches
