"""The choice of validation documents among the held-out ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.data.holdout import MINIMUM_PART, choose_validation
from sbp_fast.errors import UserError

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=40)


@given(SIZES, st.floats(0.01, 0.99), st.integers(0, 1 << 30))
def test_validation_holds_whole_originals_near_the_wanted_share(sizes: list[int], share: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    names = generator.integers(0, 1 << 64, len(sizes), np.uint64)
    originals = generator.permutation(np.repeat(names, sizes))
    wanted = round(share * len(originals))
    try:
        validation = choose_validation(originals, share)
    except UserError:
        assert len(originals) < 2 * MINIMUM_PART or min(wanted, len(originals) - wanted) < MINIMUM_PART + max(sizes)
        return
    test = np.setdiff1d(np.arange(len(originals)), validation)
    assert not set(originals[validation].tolist()) & set(originals[test].tolist())
    assert min(len(validation), len(test)) >= MINIMUM_PART
    assert wanted - max(sizes) < len(validation) <= wanted
    assert (np.diff(validation) > 0).all()
    # a function of the names and sizes alone, not of the order of the documents
    order = np.argsort(originals, kind="stable")
    assert set(originals[order][choose_validation(originals[order], share)]) == set(originals[validation])


def test_an_original_larger_than_the_share_is_passed_over() -> None:
    originals = np.array([0] * 8 + [1, 2, 3, 4], np.uint64)
    assert choose_validation(originals, 0.25).tolist() == [8, 9, 10]
    with pytest.raises(UserError, match="12 held-out documents, of 1 originals"):
        choose_validation(np.zeros(12, np.uint64), 0.5)
