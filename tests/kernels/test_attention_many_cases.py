"""The attention kernels in Triton's interpreter, on thousands of random forests."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sbp_kernels import PackedLayout
from sbp_kernels.layout.plan import Tiles
from test_attention import assert_accurate, few_slots, inputs, poisoned, repeated  # noqa: F401  (two are fixtures)
from trees import forests, tile_sizes

LARGE = st.one_of(
    forests(maximum_segments=200, maximum_length=12, maximum_depth=4),
    forests(maximum_segments=6, maximum_length=300, maximum_depth=4),
    st.integers(1, 2000).map(lambda tokens: ([tokens], [-1])),
    st.integers(1, 60).map(lambda tokens: ([tokens, *[9] * 64], [-1, *[0] * 64])),
    st.integers(1, 200).map(lambda count: ([1] * count, [-1] * count)),
)
SMALL_FORESTS = forests(maximum_segments=6, maximum_length=16, maximum_depth=4)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@settings(max_examples=2000)
@given(
    st.data(), st.integers(1, 40), tile_sizes(16, 32), st.sampled_from([(2, 2), (2, 1)]),
    st.sampled_from([torch.float32, torch.float16]), st.sampled_from([16, 24, 64]),
)  # fmt: skip
def test_the_kernels_err_no_more_than_twice_torchs_operation_in_two_thousand_cases(
    data: st.DataObject, size: int, tiles: Tiles, heads: tuple[int, int], dtype: torch.dtype, width: int
) -> None:
    """One case in forty is large, in tiles to match: the interpreter takes seconds for it."""
    if size == 40:
        forest, tiles = data.draw(LARGE), data.draw(tile_sizes(64, 128))
    else:
        forest = data.draw(SMALL_FORESTS)
    layout = PackedLayout.from_tree(*repeated(*forest), tiles=tiles)
    assert_accurate(layout, inputs(len(layout), heads, dtype, width), "triton")
