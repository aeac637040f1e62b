from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.dedup.shingle_index import (
    FULL,
    MINIMUM_SLOTS,
    Batch,
    ShingleIndex,
    plan_passes,
    shingle_positions,
    slots_for,
)

Texts = list[list[int]]
texts = st.lists(st.lists(st.integers(0, 3), max_size=14), max_size=6)


def batches(bodies: Texts, at_once: int = 2) -> list[Batch]:
    """Texts with ends, a few at a time; the ends are like tokens of texts, which must not matter."""
    found = []
    for start in range(0, len(bodies), at_once):
        rows = [[0, *body, 1] for body in bodies[start : start + at_once]]
        found.append((np.array([id for row in rows for id in row], np.uint16), np.cumsum([0, *map(len, rows)])))
    return found


def shingles(bodies: Texts, width: int) -> set[tuple[int, ...]]:
    return {tuple(body[i : i + width]) for body in bodies for i in range(len(body) - width + 1)}


def counts(index: ShingleIndex, bodies: Texts) -> list[list[int]]:
    return [row for batch in batches(bodies) for row in index.count(batch).tolist()]


@given(known=texts, others=texts, asked=texts, width=st.integers(1, 5), passes=st.integers(1, 5))
def test_counts_equal_those_of_sets_in_any_number_of_passes(
    known: Texts, others: Texts, asked: Texts, width: int, passes: int
) -> None:
    edges = [(number << 64) // passes for number in range(passes + 1)]
    found = np.zeros((len(asked), 3), np.int64)
    for low, high in itertools.pairwise(edges):
        index = ShingleIndex(width, 256, (low, high - 1))
        index.add(batches(known), 0)
        index.add(batches(others), 1)
        found += np.array(counts(index, asked), np.int64).reshape(-1, 3)
    first, second = shingles(known, width), shingles(others, width) - shingles(known, width)
    expected = [[len(one), len(one & first), len(one & second)] for one in (shingles([body], width) for body in asked)]
    assert found.tolist() == expected


@given(sample=texts, corpus=texts, width=st.integers(1, 5))
def test_mark_equals_set_membership(sample: Texts, corpus: Texts, width: int) -> None:
    index = ShingleIndex(width, 256)
    index.add(batches(sample), 0)
    index.mark(batches(corpus), 1)
    known = shingles(corpus, width)
    expected = [[len(one), len(one - known), len(one & known)] for one in (shingles([body], width) for body in sample)]
    assert counts(index, sample) == expected


@given(st.integers(0, 10**9), st.floats(1e3, 1e11))
def test_passes_cover_all_hashes_once_within_the_memory(positions: int, memory: float) -> None:
    slots, ranges = plan_passes(positions, memory)
    assert slots * 8 <= max(memory, 8 * MINIMUM_SLOTS) and slots & (slots - 1) == 0
    assert ranges[0][0] == 0 and ranges[-1][1] == 2**64 - 1
    assert all(low == high + 1 for (_, high), (low, _) in itertools.pairwise(ranges))
    assert positions / len(ranges) <= slots * 0.5 + 1
    assert len(ranges) == 1 or positions > slots // 2


@given(st.integers(0, 10**9))
def test_slots_for_leaves_the_table_at_most_half_full(count: int) -> None:
    assert slots_for(count) >= 2 * count and (slots_for(count) == MINIMUM_SLOTS or slots_for(count) < 4 * count + 4)


def test_a_table_that_is_too_small_raises() -> None:
    index = ShingleIndex(2, 64)
    bodies = [np.random.default_rng(0).integers(0, 1000, 500).tolist()]
    with pytest.raises(RuntimeError, match="too small"):
        index.add(batches(bodies), 0)
    assert (index._slots != 0).sum() <= FULL * 64 + 1


def test_shingle_positions_leave_out_begin_and_end() -> None:
    bodies = [[1] * length for length in (0, 2, 3, 10)]
    offsets = np.cumsum([0, *(len(body) + 2 for body in bodies)])
    assert shingle_positions(offsets, 3) == 0 + 0 + 1 + 8


def test_many_shingles_in_many_batches_are_counted() -> None:
    random = np.random.default_rng(1)
    bodies = [random.integers(0, 5000, 300).tolist() for _ in range(60)]
    index = ShingleIndex(4, slots_for(60 * 300))
    index.add(batches(bodies[:30], 7), 0)
    assert [row[1] for row in counts(index, bodies)] == [297] * 30 + [0] * 30
