"""Where the package's operations are registered with PyTorch: `torch.ops.sbp_kernels.*`.

`define` and `impl` cost a call less than PyTorch's `custom_op` does, and give the same to `torch.compile`,
autograd, FakeTensor and activation checkpointing.
"""

from torch import library

LIBRARY = library.Library("sbp_kernels", "DEF")
