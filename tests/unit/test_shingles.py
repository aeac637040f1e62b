import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_fast.pairs.shingles import ShingleTable, repeated_share, shingle_hashes

TEXTS = st.lists(st.integers(0, 3), max_size=24)


def shingles(tokens: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def shingle_set(tokens: list[int], n: int) -> set[tuple[int, ...]]:
    return set(shingles(tokens, n)) if len(tokens) >= n else {tuple(tokens)}


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(TEXTS, min_size=1, max_size=8), n=st.integers(1, 6))
def test_containment_is_that_of_the_sets(texts: list[list[int]], n: int) -> None:
    texts.append(list(texts[0]))
    table = ShingleTable.build([np.array(tokens, np.uint16) for tokens in texts], n)
    first, second = (index.ravel() for index in np.meshgrid(np.arange(len(texts)), np.arange(len(texts))))
    of_first, of_second = table.containment(first, second)
    for pair, (a, b) in enumerate(zip(first, second, strict=True)):
        left, right = shingle_set(texts[a], n), shingle_set(texts[b], n)
        assert of_first[pair] == len(left & right) / len(left)
        assert of_second[pair] == len(left & right) / len(right)


@settings(deadline=None, max_examples=150)
@given(tokens=TEXTS, n=st.integers(1, 6))
def test_hashes_are_sorted_unique_and_one_a_shingle(tokens: list[int], n: int) -> None:
    hashes = shingle_hashes(tokens, n)
    assert hashes.dtype == np.uint64 and (np.diff(hashes.astype(object)) > 0).all()
    assert len(hashes) == len(set(shingles(tokens, n)))


@settings(deadline=None, max_examples=150)
@given(tokens=TEXTS, n=st.integers(1, 6))
def test_repeated_share_counts_positions(tokens: list[int], n: int) -> None:
    all_shingles = shingles(tokens, n)
    repeated = sum(all_shingles.count(shingle) > 1 for shingle in all_shingles)
    assert repeated_share(tokens, n) == (repeated / len(all_shingles) if all_shingles else 0.0)


def test_large_and_ordered_ids_stay_apart() -> None:
    """Ids beyond 16 bits, and shingles of the same tokens in another order, are other shingles."""
    assert len(shingle_hashes([1, 2, 2, 1, 70_001, 2, 1, 65_537, 1, 1], 2)) == 8


def test_a_short_text_is_contained_in_its_equals_alone() -> None:
    table = ShingleTable.build([np.array(tokens) for tokens in ([5, 6], [5, 6], [4, 5, 6, 7], [5], [])], 3)
    assert table.containment([0, 0, 0, 3, 4, 4], [1, 2, 3, 0, 4, 0])[0].tolist() == [1, 0, 0, 0, 1, 0]
