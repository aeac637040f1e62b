import pytest
import torch
from hypothesis import given
from sbp_kernels import PackedLayout
from sbp_kernels.reference import dense_mask
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
