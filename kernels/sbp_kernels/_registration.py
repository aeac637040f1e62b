"""Registration of the package's operations with PyTorch, as `torch.ops.sbp_kernels.*`.

`define` and `impl` cost a call less than PyTorch's `custom_op` does, and give the same to `torch.compile`,
autograd, FakeTensor and activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, library

LIBRARY = library.Library("sbp_kernels", "DEF")


def register_operation(
    schema: str,
    implementation: Callable[..., Any] | str,
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
) -> None:
    """Make `torch.ops.sbp_kernels.<name>`, opaque to tracing.

    Args:
        schema: `<name>(arguments) -> results`; the first argument is a tensor.
        implementation: a function with these arguments, or "module.function" in this package, a module that the first call
            imports, so that the package imports where there is no triton. It runs with the device of its first argument as
            the current one, as Triton needs it.
        fake: a function with these arguments that returns empty tensors of the results' shapes and dtypes.
        backward: (ctx, *gradients of the results) -> gradients of the arguments. Without it there is no gradient.
        save: (ctx, arguments, results), which keeps in ctx what `backward` needs; given where `backward` is.
    """
    name, _, _ = schema.partition("(")
    function = _imported_by_first_call(implementation) if isinstance(implementation, str) else implementation

    def on_device_of_tensors(first: Tensor, *rest: Any) -> Any:
        if not first.is_cuda:
            return function(first, *rest)
        with torch.cuda.device(first.device):
            return function(first, *rest)

    LIBRARY.define(schema)
    LIBRARY.impl(name, on_device_of_tensors, "CompositeExplicitAutograd")
    library.register_fake(f"sbp_kernels::{name}", fake, lib=LIBRARY)
    if backward is not None:
        library.register_autograd(f"sbp_kernels::{name}", backward, setup_context=save, lib=LIBRARY)


def _imported_by_first_call(path: str) -> Callable[..., Any]:
    module_name, _, function = f"sbp_kernels.{path}".rpartition(".")

    def call(*arguments: Any) -> Any:
        return getattr(import_module(module_name), function)(*arguments)

    return call
