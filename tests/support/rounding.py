"""Whether this CPU's matrix products let a document be the same bits whatever it is drawn with (docs/log.md)."""

import pytest
import torch


def rows_round_alone() -> bool:
    """Whether a row's products are the same bits in every multiple of 16 rows, in the widths of the tests' models."""
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
