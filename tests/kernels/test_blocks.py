"""Lists of blocks that meet, against the mask of segment trees written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sbp_kernels import PackedLayout
from sbp_kernels.layout.blocks import BlockLists, is_visible, list_blocks
from sbp_kernels.layout.reference import dense_mask
from torch import Tensor, arange
from trees import forests, trees


def expected(partial: np.ndarray, full: np.ndarray) -> list[np.ndarray]:
    """Counts and ascending lists of the true columns of each row, padded with zeros."""
    results = []
    for met in (partial, full):
        counts = met.sum(1)
        order = np.argsort(~met, axis=1, kind="stable")
        results += [counts, np.where(np.arange(met.shape[1]) < counts[:, None], order, 0)]
    return results


def assert_lists_equal(found: BlockLists, wanted: list[np.ndarray]) -> None:
    for name, tensor, array in zip(BlockLists._fields, found, wanted, strict=True):
        assert str(tensor.dtype) == "torch.int32" and tensor.shape == array.shape, name
        assert (tensor.numpy() == array).all(), name


def assert_blocks_equal_the_mask(layout: PackedLayout, query_rows: int, key_rows: int) -> int:
    """Compare with every pair of every block, and return how many blocks are full."""
    tokens = len(layout)
    mask = np.pad(dense_mask(layout).numpy(), ((0, -tokens % query_rows), (0, -tokens % key_rows)))
    blocks = mask.reshape(-1, query_rows, mask.shape[1] // key_rows, key_rows)
    some, full = blocks.any((1, 3)), blocks.all((1, 3))
    by_query, by_key = list_blocks(layout.visible_until.numpy(), query_rows, key_rows)
    assert_lists_equal(by_query, expected(some & ~full, full))
    assert_lists_equal(by_key, expected((some & ~full).T, full.T))
    return int(full.sum())


@settings(max_examples=150)
@given(forests(maximum_segments=14, maximum_length=40), st.sampled_from([1, 2, 5, 8, 16]), st.sampled_from([1, 3, 8, 16]))
def test_blocks_of_any_tree_and_size_equal_the_mask(
    forest: tuple[list[int], list[int]], query_rows: int, key_rows: int
) -> None:
    assert_blocks_equal_the_mask(PackedLayout.from_tree(*forest), query_rows, key_rows)


def test_blocks_of_2000_random_trees_equal_the_mask() -> None:
    random = np.random.default_rng(18)
    full = 0
    for _ in range(2000):
        lengths = random.choice([1, 3, 16, 32, 33, 64], random.integers(1, 9)).tolist()
        parents, path = [], []
        for segment in range(len(lengths)):
            del path[random.integers(0, len(path) + 1) :]
            parents.append(path[-1] if path else -1)
            path.append(segment)
        query_rows, key_rows = random.choice([(16, 16), (32, 16), (16, 32), (128, 128)])
        full += assert_blocks_equal_the_mask(PackedLayout.from_tree(lengths, parents), query_rows, key_rows)
    assert full > 2000  # the trees were not too small for any


def test_blocks_of_a_seed_with_two_partners() -> None:
    layout = PackedLayout.from_tree([4, 4, 4], [-1, 0, 0])
    by_query, by_key = list_blocks(layout.visible_until.numpy(), 4, 4)
    assert by_query.partial.tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]] and by_query.partial_count.tolist() == [1, 1, 1]
    assert by_query.full.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0]] and by_query.full_count.tolist() == [0, 1, 1]
    assert by_key.full.tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 0]] and by_key.full_count.tolist() == [2, 0, 0]


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129])
def test_blocks_of_one_document_have_the_shape_of_its_length(tokens: int) -> None:
    until = PackedLayout.from_lengths([tokens] if tokens else []).visible_until.numpy()
    by_query, by_key = list_blocks(until, 256, 128)
    queries, keys = -(-tokens // 256), -(-tokens // 128)
    assert by_query.partial.shape == by_query.full.shape == (queries, keys)
    assert by_key.partial.shape == by_key.full.shape == (keys, queries)
    assert by_query.partial_count.tolist() == [keys] * queries and not by_query.full_count.any()


@settings(max_examples=60)
@given(trees())
def test_the_rule_of_visibility_equals_the_mask(layout: PackedLayout) -> None:
    token: Tensor = arange(len(layout))
    assert is_visible(token[:, None], token, layout.visible_until).equal(dense_mask(layout))
