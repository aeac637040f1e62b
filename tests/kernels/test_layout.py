import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sbp_kernels import PackedLayout
from sbp_kernels.layout.packed_layout import move_in_one_copy
from sbp_kernels.layout.plan import WIDE
from sbp_kernels.layout.reference import dense_mask
from trees import trees


@given(trees())
def test_one_integer_a_token_is_the_whole_mask(layout: PackedLayout) -> None:
    query, key = torch.arange(len(layout)).unsqueeze(1), torch.arange(len(layout))
    assert torch.equal((key <= query) & (query < layout.visible_until), dense_mask(layout))


@given(trees())
def test_a_tokens_position_is_the_number_of_other_tokens_it_sees(layout: PackedLayout) -> None:
    visible = dense_mask(layout).sum(1)
    assert torch.equal(layout.positions, (visible - 1).int())
    assert layout.visible_pairs() == visible.sum()


def test_a_shared_seed_by_hand() -> None:
    layout = PackedLayout.from_tree([2, 3, 1, 2], [-1, 0, 0, -1])
    assert layout.visible_until.tolist() == [6, 6, 5, 5, 5, 6, 8, 8]
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 2, 0, 1]
    assert layout.path(2) == [0, 2]
    assert layout.visible_until.dtype == layout.positions.dtype == torch.int32


def test_documents_and_pairs_are_trees() -> None:
    assert PackedLayout.from_lengths([3, 4]).parents == (-1, -1)
    pairs = PackedLayout.from_pairs([(3, 4), (1, 2)])
    assert (pairs.lengths, pairs.parents) == ((3, 4, 1, 2), (-1, 0, -1, 2))


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ([3, 0], [-1, -1], r"lengths\[1\] is 0"),
        ([3], [-1, -1], "lengths and parents"),
        ([3, 3], [-1, 1], r"parents\[1\] is 1"),
        ([3, 3], [-1, -2], r"parents\[1\] is -2"),
        ([3, 3, 3, 3], [-1, 0, -1, 1], r"parents\[3\] is 1.*depth-first"),
        ([1 << 30, 1 << 30], [-1, -1], "beyond int32"),
    ],
)
def test_bad_trees_are_refused(lengths: list[int], parents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_tree(lengths, parents)


@given(trees())
def test_a_mask_made_elsewhere_gives_the_same_layout(layout: PackedLayout) -> None:
    again = PackedLayout.from_visible_until(layout.visible_until.tolist())
    assert torch.equal(again.visible_until, layout.visible_until) and torch.equal(again.positions, layout.positions)


@given(st.lists(st.integers(0, 9), max_size=8))
def test_cu_seqlens_are_documents(lengths: list[int]) -> None:
    ends = [0, *itertools.accumulate(lengths)]
    right = PackedLayout.from_lengths([length for length in lengths if length])
    for given_as in (ends, torch.tensor(ends, dtype=torch.int32)):
        found = PackedLayout.from_cu_seqlens(given_as, tokens=sum(lengths))
        assert torch.equal(found.visible_until, right.visible_until) and found.lengths == right.lengths


def test_cu_seqlens_on_a_device_stay_there() -> None:
    ends = torch.tensor([0, 5, 9], dtype=torch.int32, device="meta")
    found = PackedLayout.from_cu_seqlens(ends, tokens=9)
    assert len(found) == 9 and found.visible_until.device.type == "meta" and found.lengths is None
    assert found.plan is not None and found.plan.tiles == WIDE
    with pytest.raises(ValueError, match="tokens must be given where cu_seqlens is on a device"):
        PackedLayout.from_cu_seqlens(ends)
    with pytest.raises(ValueError, match="made on a device"):
        found.path(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PackedLayout.from_cu_seqlens([1, 3]), "cu_seqlens must be one-dimensional, begin with 0"),
        (lambda: PackedLayout.from_cu_seqlens([0, 3, 2]), "never decrease"),
        (lambda: PackedLayout.from_cu_seqlens([]), "begin with 0"),
        (lambda: PackedLayout.from_cu_seqlens([0, 3], tokens=4), "cu_seqlens ends with 3, but tokens is 4"),
        (lambda: PackedLayout.from_visible_until([2, 2, 2]), r"visible_until\[2\] is 2: it must exceed 2, stay within T = 3"),
        (lambda: PackedLayout.from_visible_until([2, 3, 3]), r"visible_until\[1\] is 3"),
        (lambda: PackedLayout.from_visible_until([1, 3]), r"visible_until\[1\] is 3"),
        (lambda: PackedLayout.from_visible_until([1, 2 + (1 << 32)]), r"visible_until\[1\] is 4294967298"),
        (lambda: PackedLayout.from_visible_until([1.0, 2.0]), r"visible_until must be integers \[T\]: got float64 \[2\]"),
    ],
)
def test_bad_masks_are_refused(call: Callable[[], PackedLayout], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_moving_keeps_the_plan_and_every_table_aligned() -> None:
    layout = PackedLayout.from_tree([5, 3, 9, 4], [-1, 0, 0, -1])
    assert layout.plan is None and layout.to("cpu") is layout
    moved = layout.to("meta")
    planned = layout.planned().plan
    assert planned is not None and moved.plan is not None and moved.plan.tiles == planned.tiles
    assert [table.shape for table in moved.plan.tables] == [table.shape for table in planned.tables]
    assert all(table.storage_offset() % 4 == 0 for table in (moved.visible_until, moved.positions, *moved.plan.tables))


def test_moving_copies_every_value() -> None:
    layout = PackedLayout.from_tree([5, 3, 9, 4], [-1, 0, 0, -1]).planned()
    assert layout.plan is not None
    tensors = [layout.visible_until, layout.positions, *layout.plan.tables]
    moved = move_in_one_copy(tensors, torch.device("cpu"))
    assert all(torch.equal(mine, right) for mine, right in zip(moved, tensors, strict=True))
