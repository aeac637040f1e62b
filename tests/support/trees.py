"""Random segment trees for the tests, and the rule by which errors are judged."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from sbp_kernels import PackedLayout
from sbp_kernels.layout.plan import Tiles
from torch import Tensor


@st.composite
def forests(
    draw: st.DrawFn, maximum_segments: int = 8, maximum_length: int = 9, maximum_depth: int = 8
) -> tuple[list[int], list[int]]:
    """Strategy of lengths and parents of a forest of any shape, in depth-first order."""
    lengths = draw(st.lists(st.integers(1, maximum_length), min_size=1, max_size=maximum_segments))
    parents: list[int] = []
    open_path: list[int] = []
    for segment in range(len(lengths)):
        del open_path[draw(st.integers(0, min(len(open_path), maximum_depth - 1))) :]
        parents.append(open_path[-1] if open_path else -1)
        open_path.append(segment)
    return lengths, parents


def trees(maximum_segments: int = 8, maximum_length: int = 9) -> st.SearchStrategy[PackedLayout]:
    """Strategy of layouts of any forest, with default tiles."""
    return forests(maximum_segments, maximum_length).map(lambda forest: PackedLayout.from_tree(*forest))


def tile_sizes(*sizes: int) -> st.SearchStrategy[Tiles]:
    """Strategy of tiles whose four sizes are among `sizes`."""
    return st.builds(Tiles, *[st.sampled_from(sizes)] * 4)


def error(found: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the difference."""
    return (found.double() - exact.double()).square().mean().sqrt().item()


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """Root mean square of what one rounding to `dtype` changes: no result in that dtype can be asked to err by less.

    Exact results that happen to be representable change by nothing; of their size a quarter of a unit in the last place counts.
    """
    size = exact.double().square().mean().sqrt().item()
    return max(error(exact.to(dtype), exact), torch.finfo(dtype).eps / 4 * size)
