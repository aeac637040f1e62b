"""Degree caps: no seed has too many partners and no partner too many seeds.

Every seed gets its best partner before any gets its second: otherwise the most similar few would fill the popular partners,
and seeds that have no other would go without. Within such a turn the more similar pairs come first. In memory are two
counts of each document and one turn at a time, which has a pair of each seed at most.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sbp_fast.data.external_sort import read_all_between, write_rows
from sbp_fast.pairs.criteria import PARTNER_FULL, SEED_FULL, TAKEN, take_in_turn, turns
from sbp_fast.pairs.score import DIRECTED
from sbp_fast.pairs.tasks import NEIGHBOUR_BYTES, Pairing
from sbp_fast.pipeline.executors.executor import Advance

TURN = np.dtype([("turn", "<i8"), *DIRECTED.descr])


def write_turns(pairing: Pairing, number: int, advance: Advance) -> None:
    """Write the ordered pairs whose seed is in a range, each with its turn, by the turn; and how many each turn has."""
    rows = read_all_between(pairing.files("directed"), DIRECTED, "seed", *pairing.ranges[number])
    rows = rows[np.lexsort((rows["partner"], -rows["score"], rows["seed"]))]
    turn = turns(rows["seed"])
    order = np.argsort(turn, kind="stable")
    columns = {name: rows[name][order] for name in DIRECTED.names or ()}
    write_rows(pairing.file("turns", number), TURN, turn=turn[order], **columns)
    write_rows(pairing.file("sizes", number), np.dtype([("pairs", "<i8")]), pairs=np.bincount(turn))  # last: it marks it


def cap_degrees(pairing: Pairing) -> dict[str, int]:
    """Take pairs turn by turn and write them; returns how many were dropped by which cap."""
    partners_of, seeds_of = (np.zeros(len(pairing.documents), np.int32) for _ in range(2))
    capped = {"seed_cap": 0, "partner_cap": 0}
    for batch, (low, high) in enumerate(_batches(pairing)):
        rows = read_all_between(pairing.files("turns"), TURN, "turn", low, high)
        rows = rows[np.lexsort((rows["partner"], rows["seed"], -rows["score"], rows["turn"]))]
        seeds, partners = rows["seed"].copy(), rows["partner"].copy()
        most = pairing.settings.partners_per_seed, pairing.settings.seeds_per_partner
        outcome = take_in_turn(seeds, partners, partners_of, seeds_of, *most)
        capped["seed_cap"] += int((outcome == SEED_FULL).sum())
        capped["partner_cap"] += int((outcome == PARTNER_FULL).sum())
        taken = rows[outcome == TAKEN]
        taken = taken[np.argsort(taken["seed"], kind="stable")]
        write_rows(pairing.file("taken", batch), DIRECTED, **{name: taken[name] for name in DIRECTED.names or ()})
    return capped


def taken_pairs(pairing: Pairing) -> Iterator[np.ndarray]:
    """The pairs that `cap_degrees` took, DIRECTED in order of (seed, falling score, partner), a range of seeds at a time."""
    files = [pairing.file("taken", batch) for batch in range(len(_batches(pairing)))]
    for low, high in pairing.ranges:
        rows = read_all_between(files, DIRECTED, "seed", low, high)
        yield rows[np.lexsort((rows["partner"], -rows["score"], rows["seed"]))]


def _batches(pairing: Pairing) -> list[tuple[int, int]]:
    """Turns [low, high) to be taken at once: as many as the memory holds."""
    sizes = [np.load(file)["pairs"] for file in pairing.files("sizes")]
    total = np.zeros(max(map(len, sizes)), np.int64)
    for size in sizes:
        total[: len(size)] += size
    ends, most, batches, low = np.cumsum(total), int(pairing.settings.memory_gib * 2**30) // NEIGHBOUR_BYTES, [], 0
    while low < len(total):
        taken = ends[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(ends, taken + most, "right")))
        batches.append((low, high))
        low = high
    return batches
