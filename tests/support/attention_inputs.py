"""Random queries, keys and values."""

import torch
from torch import Tensor


def inputs(tokens: int, heads: tuple[int, int], dtype: torch.dtype, width: int = 8) -> list[Tensor]:
    """Return q, k, v and a gradient of the output, of `heads` query and key heads; float64 numbers rounded to `dtype`."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, count, width) for count in (heads[0], heads[1], heads[1], heads[0])]  # q, k, v, gradient of the output
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
