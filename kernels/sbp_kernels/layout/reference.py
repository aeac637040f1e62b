"""The mask of a layout, written out, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from sbp_kernels.layout.packed_layout import PackedLayout


def dense_mask(layout: PackedLayout) -> Tensor:
    """Mask, bool [T, T], True where query i (row) sees key j (column), read off the parents alone, not off `visible_until`."""
    if layout.lengths is None:
        raise ValueError("this layout was made on a device: its segments are not known on the host")
    segment_of = torch.repeat_interleave(torch.arange(len(layout.lengths)), torch.tensor(layout.lengths))
    sees = torch.zeros(len(layout.lengths), len(layout.lengths), dtype=torch.bool)
    for segment in range(len(layout.lengths)):
        sees[segment, layout.path(segment)] = True
    return sees[segment_of][:, segment_of].tril()
