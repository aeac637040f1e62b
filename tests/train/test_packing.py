from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.data.permutation import key_of, permute
from sbp_fast.train.data.packing import Packing, least_room

SEEDS = st.integers(0, 2**31)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=200), room=st.integers(0, 100), seed=SEEDS, epoch=st.integers(0, 9)
)
def test_every_item_is_in_exactly_one_bin_of_each_epoch_and_no_bin_overflows(
    sizes: list[int], room: int, seed: int, epoch: int
) -> None:
    capacity = max(sizes) + room
    packing = Packing(np.array(sizes), capacity, seed)
    bins = [packing.items(number, epoch) for number in range(packing.bins)]
    assert Counter(np.concatenate(bins).tolist()) == Counter(range(len(sizes)))
    filled = [sum(sizes[item] for item in items) for items in bins]
    assert min(filled) > 0 and max(filled) <= capacity
    assert packing.padding_share == pytest.approx(1 - sum(sizes) / (packing.bins * capacity), abs=1e-15)
    again = Packing(np.array(sizes), capacity, seed)
    assert all(np.array_equal(again.items(number, epoch), items) for number, items in enumerate(bins))


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=120), seed=SEEDS)
def test_no_two_bins_fit_into_one(sizes: list[int], seed: int) -> None:
    """Best fit opens a bin only for what fits in none, so at most one of them is half empty."""
    packing = Packing(np.array(sizes), 60, seed)
    filled = sorted(sum(sizes[item] for item in packing.items(number, 0)) for number in range(packing.bins))
    assert packing.bins == 1 or filled[0] + filled[1] > 60


def test_items_share_their_bin_with_others_in_each_epoch() -> None:
    sizes = np.random.default_rng(0).integers(10, 60, 3000)
    packing = Packing(sizes, 200, seed=1)
    companies = [{tuple(sorted(packing.items(number, epoch).tolist())) for number in range(packing.bins)} for epoch in range(3)]
    assert len(companies[0] & companies[1]) + len(companies[1] & companies[2]) < 0.01 * packing.bins


@pytest.mark.parametrize(("median", "longest", "capacity"), [(150, 512, 2048), (600, 4096, 16384), (60, 224, 16384)])
def test_padding_of_documents_of_usual_lengths_is_below_half_a_percent(median: int, longest: int, capacity: int) -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(median), 0.9, 100_000)
    packing = Packing(np.clip(lengths, 16, longest).astype(int), capacity, seed=0)
    assert packing.padding_share < 0.005


def test_no_items_and_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to pack"):
        Packing(np.zeros(0, np.int64), 10, 0)
    for sizes in ([3, 11], [0, 3]):
        with pytest.raises(ValueError, match="sizes must be from 1 to 10"):
            Packing(np.array(sizes), 10, 0)


@given(marked=st.sets(st.integers(0, 199)), size=st.integers(0, 199))
def test_least_room_is_the_smallest_marked_number_that_suffices(marked: set[int], size: int) -> None:
    some = np.zeros(4, np.uint64)
    for number in marked:
        some[number >> 6] |= np.uint64(1 << (number & 63))
    assert least_room(some, size) == min((number for number in marked if number >= size), default=-1)


@given(size=st.integers(1, 400), key=st.tuples(SEEDS, st.integers(0, 3), st.integers(0, 9)))
def test_permute_is_a_permutation(size: int, key: tuple[int, ...]) -> None:
    assert sorted(permute(index, size, key_of(*key)) for index in range(size)) == list(range(size))


def test_permute_of_a_large_range_stays_inside_and_injective() -> None:
    size = 488_000_001
    images = {permute(index, size, key_of(1, 0, 0)) for index in range(2000)}
    assert len(images) == 2000 and max(images) < size and min(images) >= 0
    assert len({image * 16 // size for image in images}) == 16  # spread over the whole range


def test_permute_depends_on_its_key() -> None:
    rows = [[permute(index, 1000, key_of(0, epoch)) for index in range(1000)] for epoch in range(4)]
    same = [np.mean(np.array(one) == np.array(other)) for one in rows for other in rows if one is not other]
    assert max(same) < 0.01
    assert np.corrcoef(rows[0], range(1000))[0, 1] < 0.1
