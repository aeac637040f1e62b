"""A stand-in for matrix products that read memory beside a strided operand, as oneDNN's do in bfloat16 with AMX."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten
PRODUCTS = (
    ATEN.mm,
    ATEN.bmm,
    ATEN.addmm,
    ATEN.addmm_,
    ATEN.baddbmm,
    ATEN.mv,
    ATEN.dot,
    ATEN.linear,
    ATEN.einsum,
    ATEN._scaled_dot_product_flash_attention_for_cpu,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
)


def memory_beside(operand: Tensor) -> Tensor:
    """Return the elements between the first and the last of a strided tensor that do not belong to it, 1-D."""
    if not operand.numel():
        return operand.new_empty(0)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(operand.shape, operand.stride(), strict=True))
    span = operand.detach().as_strided((extent,), (1,))
    beside = torch.ones(extent, dtype=torch.bool)
    beside.as_strided(operand.shape, operand.stride()).fill_(False)
    return span[beside]


class ProductsReadPadding(TorchDispatchMode):
    """Make a product NaN if any memory between the rows of a floating-point operand is not finite.

    Attributes:
        count: products that ran, so that a test can tell that there were some.
    """

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sbp_kernels":  # its products are those inside
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.count += 1
            operands = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_floating_point()]
            if not all(memory_beside(x).isfinite().all() for x in operands):
                for out in tree_leaves(result):
                    out.fill_(float("nan"))
        return result


@contextmanager
def hostile_memory() -> Iterator[ProductsReadPadding]:
    """Make products read the padding of their operands, and fill all uninitialized memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with ProductsReadPadding() as products:
            yield products
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
