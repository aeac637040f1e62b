"""The choice between Triton kernels and other backends that several operations share."""

from __future__ import annotations

import os

import torch
from torch import Tensor

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
    """Check that Triton's kernels can run on the device of x.

    Raises:
        ValueError: they cannot.
    """
    if not x.is_cuda and not interprets():
        raise ValueError("backend 'triton' needs CUDA tensors: move them, use backend='torch', or set TRITON_INTERPRET=1")


def interprets() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU, which is slow and for checking."""
    return os.environ.get("TRITON_INTERPRET") == "1"
