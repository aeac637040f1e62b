"""The segment tree of a packed sequence, and the tile plan that the kernels walk."""

from sbp_kernels.layout.packed_layout import PackedLayout
from sbp_kernels.layout.plan import NARROW, WIDE, Plan, Tiles

__all__ = ["NARROW", "WIDE", "PackedLayout", "Plan", "Tiles"]
