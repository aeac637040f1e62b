"""The fused attention as operations of PyTorch: `torch.ops.sbp_kernels.packed_attention` and its backward.

Their arguments are tensors of fixed shapes and a few constants, so that nothing is recompiled when lengths change. Triton
is imported when one of them first runs. Their log-sum-exp is in base 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbp_kernels import _tuned
from sbp_kernels._backends import interprets
from sbp_kernels._tuned import Configuration
from sbp_kernels.attention.operations import Gradients, register_attention
from sbp_kernels.attention.registry import register_attention_backend
from sbp_kernels.layout import PackedLayout

TABLES = "Tensor query_tiles, Tensor query_runs, Tensor key_tiles, Tensor key_runs, Tensor splits"
ARGUMENTS = f"Tensor visible_until, {TABLES}, float scale, int[] tiles"


class Kernel(NamedTuple):
    """A forward kernel that is a backend; all have the same backward.

    Attributes:
        operation: its name as an operation of PyTorch.
        forward: what the operation calls.
        dtypes: that it takes.
        widths: of heads that it takes.
        interpreted: whether Triton's interpreter runs it.
    """

    operation: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    dtypes: tuple[torch.dtype, ...]
    widths: Sequence[int]
    interpreted: bool = True


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool, *, backend: str
) -> tuple[Tensor, Tensor | None]:
    """Compute out [T, Hq, D] by a kernel, and lse [Hq, T] if it is wanted; differentiable."""
    kernel = KERNELS[backend]
    if q.dtype not in kernel.dtypes:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in kernel.dtypes]
        raise ValueError(f"q is {q.dtype}: backend {backend!r} takes {_listed(dtypes)}")
    if q.shape[2] not in kernel.widths:
        widths = f"up to {kernel.widths[-1]}" if isinstance(kernel.widths, range) else _listed(kernel.widths)
        raise ValueError(f"q has heads of width {q.shape[2]}: backend {backend!r} takes {widths}")
    out, lse = getattr(torch.ops.sbp_kernels, kernel.operation)(q, k, v, *_arguments(layout, scale))
    return out, lse * math.log(2) if return_lse else None


def _listed(values: Sequence[object]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}"


def _arguments(layout: PackedLayout, scale: float) -> tuple[Any, ...]:
    plan = layout.planned().plan
    assert plan is not None
    sizes = plan.tiles
    tiles = [sizes.query_rows, sizes.key_step, sizes.key_rows, sizes.query_step]
    return (layout.visible_until, *plan.tables, scale, tiles)


def _forward(q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from sbp_kernels.attention import launch

    query_tiles, query_runs, _, _, _, scale, tiles = rest
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    return launch.forward(q, k, v, visible_until, query_tiles, query_runs, scale, _configuration(q, tiles))


def _specialised_forward(
    module: str, q: Tensor, k: Tensor, v: Tensor, visible_until: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    query_tiles, query_runs, _, _, _, scale, tiles = rest
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    forward = import_module(f"sbp_kernels.attention.{module}").forward
    out, lse = forward(q, k, v, visible_until, query_tiles, query_runs, scale, tiles[0], tiles[1])
    return out, lse


def _backward(dout: Tensor, dlse: Tensor | None, *rest: Any) -> Gradients:
    from sbp_kernels.attention import launch

    q, k, v, out, lse, visible_until, *tables, scale, tiles = rest
    dout, q, k, v = (_rows_contiguous(x) for x in (dout, q, k, v))
    dlse = dlse if dlse is None else _rows_contiguous(dlse)
    return launch.backward(dout, dlse, q, k, v, out, lse, visible_until, tuple(tables), scale, _configuration(q, tiles))


def _configuration(q: Tensor, tiles: Sequence[int]) -> Configuration:
    return _tuned.configuration(q.device, q.shape[2], q.dtype, (tiles[0], tiles[1], tiles[2], tiles[3]))


def _check_device(device: torch.device, *, backend: str) -> None:
    if device.type != "cuda" and not (KERNELS[backend].interpreted and interprets()):
        raise ValueError(f"backend {backend!r} needs CUDA tensors, these are on {device.type}: use backend 'torch'")


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


SHORT, EVERY = (torch.bfloat16, torch.float16), (torch.bfloat16, torch.float16, torch.float32)
KERNELS = {
    "triton": Kernel("packed_attention", _forward, EVERY, range(1, 257)),
    "triton-hopper": Kernel("specialised_attention", partial(_specialised_forward, "hopper"), EVERY, (16, 32, 64, 128)),
    "gluon-hopper": Kernel("gluon_attention", partial(_specialised_forward, "gluon"), SHORT, (64, 128), interpreted=False),
}
"""Backend -> its kernel."""

for _name, _kernel in KERNELS.items():
    register_attention(_kernel.operation, ARGUMENTS, _kernel.forward, _backward)
    register_attention_backend(
        _name,
        partial(_attend, backend=_name),
        operations=[f"sbp_kernels::{_kernel.operation}"],
        check_device=partial(_check_device, backend=_name),
    )
