"""Operands of matrix products that a library may read beyond."""

from __future__ import annotations

from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy where a product on this device may read the memory between its rows.

    oneDNN's products in 16-bit dtypes on processors with AMX read the gap between the rows of a strided operand and multiply
    it by zeros. Where the gap holds NaN or infinity, the product is NaN.
    """
    if x.device.type != "cpu" or x.element_size() > 2 or x.is_contiguous():
        return x
    return x if x.dim() == 2 and x.T.is_contiguous() else x.contiguous()
