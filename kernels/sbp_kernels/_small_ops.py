"""What RMSNorm, rotary embedding and SwiGLU share: the choice of a backend, and how their kernels become operations."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, library

from sbp_kernels._library import LIBRARY

BACKENDS = ("auto", "torch", "triton")


def runs_triton(backend: str, x: Tensor) -> bool:
    """Whether an operation runs its Triton kernels on x. "auto" leaves what a compiler traces to that compiler.

    Raises:
        ValueError: `backend` is unknown, or cannot run on the device or dtype of x.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and (not x.is_cuda or torch.compiler.is_compiling())):
        return False
    check_device(x)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"the Triton kernels take bfloat16, float16 and float32: cast {x.dtype}, or use backend='torch'")
    return True


def check_device(x: Tensor) -> None:
    """Raises ValueError where Triton's kernels cannot run on the device of x."""
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend 'triton' needs CUDA tensors: move them, use backend='torch', or set TRITON_INTERPRET=1")


def register(schema: str, launcher: str, fake: Callable[..., Any]) -> None:
    """Make `torch.ops.sbp_kernels.<name>`, opaque to tracing, of a launcher, "module.function" in this package.

    The module is imported by the first call, so that the package imports where there is no triton. The launcher runs with
    the device of its first argument as the current one, as Triton needs it.
    """
    name, _, _ = schema.partition("(")
    module, _, function = launcher.rpartition(".")

    def launch(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return getattr(import_module(f"sbp_kernels.{module}"), function)(first, *rest)

    LIBRARY.define(schema)
    LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    library.register_fake(f"sbp_kernels::{name}", fake, lib=LIBRARY)
