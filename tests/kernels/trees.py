"""Random segment trees for the tests."""

from __future__ import annotations

from hypothesis import strategies as st
from sbp_kernels import PackedLayout
from torch import Tensor


@st.composite
def trees(draw: st.DrawFn, maximum_segments: int = 8, maximum_length: int = 9) -> PackedLayout:
    """A forest in depth-first order, of any shape."""
    lengths = draw(st.lists(st.integers(1, maximum_length), min_size=1, max_size=maximum_segments))
    parents: list[int] = []
    open_path: list[int] = []
    for segment in range(len(lengths)):
        keep = draw(st.integers(0, len(open_path)))
        del open_path[keep:]
        parents.append(open_path[-1] if open_path else -1)
        open_path.append(segment)
    return PackedLayout.from_tree(lengths, parents)


def error(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference."""
    return (found.double() - exact.double()).square().mean().sqrt().item()
