"""A check whether this CPU's matrix products give a document the same bits in any batch (docs/log.md)."""

import pytest
import torch


def rows_round_alone() -> bool:
    """Return whether a row's products are the same bits in every multiple of 16 rows, in the widths of the tests' models."""
    generator = torch.Generator().manual_seed(0)
    for inputs in (16, 24, 32, 48):
        weight, rows = (torch.randn(size, inputs, generator=generator) for size in (300, 128))
        whole = torch.nn.functional.linear(rows, weight)
        for count in range(16, 128, 16):
            if not torch.equal(torch.nn.functional.linear(rows[-count:], weight), whole[-count:]):
                return False
    return True


NEEDS_SAME_BITS = pytest.mark.skipif(
    not rows_round_alone(), reason="here a matrix product rounds a row by the number of rows beside it"
)
