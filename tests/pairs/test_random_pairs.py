import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.pairs.random_pairs import shuffle_partners


def ring(documents: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of documents at most `reach` apart on a ring, both ways."""
    seeds = np.repeat(np.arange(documents), 2 * reach)
    steps = np.tile([*range(-reach, 0), *range(1, reach + 1)], documents)
    return seeds, (seeds + steps) % documents


@given(st.integers(12, 60), st.integers(1, 2), st.integers(0, 100))
def test_shuffled_partners_are_unrelated_distinct_and_as_frequent_as_before(documents: int, reach: int, seed: int) -> None:
    seeds, partners = ring(documents, reach)
    shuffled = shuffle_partners(seeds, partners, seed)
    assert np.array_equal(np.bincount(shuffled, minlength=documents), np.bincount(partners, minlength=documents))
    before, after = (set(zip(seeds.tolist(), other.tolist(), strict=True)) for other in (partners, shuffled))
    assert not before & after and len(after) == len(seeds) and not np.any(seeds == shuffled)
    assert np.array_equal(shuffled, shuffle_partners(seeds, partners, seed))


def test_documents_that_are_all_related_cannot_be_shuffled() -> None:
    seeds, partners = np.array([0, 0, 1, 1, 2, 2]), np.array([1, 2, 0, 2, 0, 1])
    with pytest.raises(ValueError, match="6 of 6 pairs stay related"):
        shuffle_partners(seeds, partners, 0)
