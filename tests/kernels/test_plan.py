"""The tile plan against its definition in plain numpy."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sbp_kernels import PackedLayout
from sbp_kernels.layout import plan
from sbp_kernels.layout.device_plan import plan_documents
from sbp_kernels.layout.plan import Plan, Tiles, build_plan, capacities, choose_tiles, find_segments
from torch import Tensor, tensor
from trees import forests, tile_sizes


def visible(until: np.ndarray) -> np.ndarray:
    query, key = np.arange(len(until))[:, None], np.arange(len(until))
    return (key <= query) & (query < until)


def computed(table: Tensor, runs: Tensor, rows: int, step: int, mask: np.ndarray) -> np.ndarray:
    """How often each (outer, inner) pair is computed; checks what the kernels rely on along the way."""
    times = np.zeros(mask.shape, int)
    for start, stop, first, first_masked, last, _ in table[table[:, 1] > table[:, 0]].tolist():
        assert stop - start <= rows and first <= first_masked <= last
        for run in range(first, last):
            low, high = runs[run].tolist()
            for inner in range(low, high, step):
                part = mask[start:stop, inner : min(inner + step, high)]
                times[start:stop, inner : min(inner + step, high)] += part
                assert part.any(), "a step that nobody sees"
                if run < first_masked:
                    assert part.shape[1] == step and part.all(), "a step without a mask must be whole and wholly visible"
    return times


def assert_covers(found: Plan, until: np.ndarray) -> None:
    mask, tiles = visible(until), found.tiles
    assert (computed(found.query_tiles, found.query_runs, tiles.query_rows, tiles.key_step, mask) == mask).all()
    assert (computed(found.key_tiles, found.key_runs, tiles.key_rows, tiles.query_step, mask.T) == mask.T).all()


@settings(max_examples=150)
@given(forests(maximum_segments=14, maximum_length=40), tile_sizes(1, 2, 4, 8, 16), st.booleans(), st.sampled_from([1, 3, 32]))
def test_every_visible_pair_is_computed_once(
    forest: tuple[list[int], list[int]], tiles: Tiles, may_split: bool, shortest_part: int
) -> None:
    until = PackedLayout.from_tree(*forest).visible_until.numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHORTEST_PART", shortest_part)
        assert_covers(build_plan(until, tiles, may_split=may_split), until)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(0, 20), tile_sizes(1, 2, 4, 8, 16))
def test_the_plan_made_on_the_device_covers_the_same(lengths: list[int], beyond: int, tiles: Tiles) -> None:
    if not sum(lengths) + beyond:
        return
    ends = tensor([0, *np.cumsum(lengths)]).int()
    until, positions, found = plan_documents(ends, sum(lengths) + beyond, tiles)
    host = PackedLayout.from_lengths([length for length in [*lengths, beyond] if length])
    assert until.equal(host.visible_until) and positions.equal(host.positions)
    assert_covers(found, until.numpy())


@settings(max_examples=50)
@given(forests(maximum_segments=40, maximum_length=30))
def test_shapes_follow_from_the_number_of_tokens_alone(forest: tuple[list[int], list[int]]) -> None:
    until = PackedLayout.from_tree(*forest).visible_until.numpy()
    tiles = Tiles(8, 4, 8, 4)
    rows = [len(table) for table in build_plan(until, tiles, may_split=True).tables]
    expected = list(capacities(len(until), tiles, may_split=True))
    queries = PackedLayout.from_tree(*forest).planned()
    assert queries.plan is not None
    if rows[1] != expected[1]:  # a deep tree: the next power of two
        assert rows[1] & (rows[1] - 1) == 0 and rows[1] > expected[1]
        rows[1] = expected[1]
    assert rows == expected


def work(table: Tensor, runs: Tensor, step: int) -> list[int]:
    steps = -(-(runs[:, 1] - runs[:, 0]) // step)
    return [int(steps[first:last].sum()) for _, _, first, _, last, _ in table.tolist()]


@settings(max_examples=60)
@given(forests(maximum_segments=30, maximum_length=200), st.integers(1, 200))
def test_the_longest_work_comes_first_and_the_programs_are_balanced(
    forest: tuple[list[int], list[int]], processors: int
) -> None:
    until = PackedLayout.from_tree(*forest).visible_until.numpy()
    tiles = Tiles(16, 8, 16, 8)
    found = build_plan(until, tiles, may_split=True)
    sides = [(found.query_tiles, found.query_runs, tiles.key_step), (found.key_tiles, found.key_runs, tiles.query_step)]
    for table, runs, step in sides:
        steps = work(table, runs, step)
        assert steps == sorted(steps, reverse=True)
        busy = [0] * processors
        for length in steps:  # each processor takes the next program as soon as it is free
            heapq.heapreplace(busy, busy[0] + length)
        assert max(busy) <= sum(steps) / processors + max(steps)
    key_steps = work(*sides[1])
    assert max(key_steps) <= max(plan.SHORTEST_PART, -(-sum(key_steps) // plan.MAXIMUM_PARTS))


def test_a_seed_of_many_partners_is_split_and_no_slot_is_used_twice() -> None:
    until = PackedLayout.from_tree([40, *[64] * 64], [-1, *[0] * 64]).visible_until.numpy()
    found = build_plan(until, Tiles(16, 16, 16, 16), may_split=True)
    tiles = found.key_tiles[found.key_tiles[:, 1] > 0]
    used = sorted(tiles[tiles[:, 5] >= 0, 5].tolist())
    splits = found.splits[found.splits[:, 1] > 0].tolist()
    assert used == list(range(len(used))) and len(used) <= plan.SLOTS
    assert [slot for _, _, first, last in splits for slot in range(first, last)] == used
    for start, stop, first, last in splits:
        parts = tiles[(tiles[:, 5] >= first) & (tiles[:, 5] < last)]
        assert last - first == len(parts) > 1 and (parts[:, :2] == tensor([start, stop])).all()
    assert {start for start, *_ in splits} == {0, 16, 32}


@settings(max_examples=300)
@given(st.lists(st.integers(0, 9), max_size=8))
def test_a_mask_is_taken_if_and_only_if_spans_nest(until: list[int]) -> None:
    tokens = len(until)
    alone = all(token < last <= tokens for token, last in enumerate(until))
    nested = alone and all(until[i] <= j or until[j] <= until[i] for i in range(tokens) for j in range(i, tokens))
    *_, wrong = find_segments(np.array(until, np.int32))
    assert (wrong == -1) == nested


@given(forests(maximum_segments=12))
def test_segments_read_off_a_mask_have_this_mask(forest: tuple[list[int], list[int]]) -> None:
    until = PackedLayout.from_tree(*forest).visible_until.numpy()
    starts, ends, last, parents, _ = find_segments(until)
    again = PackedLayout.from_tree((ends - starts).tolist(), parents.tolist())
    assert (again.visible_until.numpy() == until).all() and (np.repeat(last, ends - starts) == until).all()
    assert len(starts) <= len(forest[0])


def test_short_documents_get_narrow_tiles() -> None:
    short, long = ([length] * (8192 // length) for length in (128, 2048))
    assert choose_tiles(PackedLayout.from_lengths(short).visible_until.numpy()) == plan.NARROW
    assert choose_tiles(PackedLayout.from_lengths(long).visible_until.numpy()) == plan.WIDE
