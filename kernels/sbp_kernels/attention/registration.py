"""What every attention of this package is to PyTorch: two operations, forward and backward, tied by autograd.

Both are opaque to tracing, take tensors of fixed shapes and constants, and change none of their inputs, so that
`torch.compile(fullgraph=True)`, FakeTensor and activation checkpointing work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from sbp_kernels._library import LIBRARY

Gradients = tuple[Tensor, Tensor, Tensor]
Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., Gradients]


def register(name: str, arguments: str, forward: Forward, backward: Backward, dispatch_keys: Sequence[str]) -> None:
    """Make `torch.ops.sbp_kernels.<name>` and `<name>_backward`.

    Args:
        arguments: the schema of what follows q, k and v: tensors first, then constants.
        forward: (q, k, v, *arguments) -> out like q, lse [Hq, T] in float32 at least.
        backward: (dout, dlse or None, q, k, v, out, lse, *arguments) -> dq, dk, dv.
        dispatch_keys: where `forward` and `backward` run.
    """
    LIBRARY.define(f"{name}(Tensor q, Tensor k, Tensor v, {arguments}) -> (Tensor, Tensor)")
    LIBRARY.define(
        f"{name}_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {arguments})"
        " -> (Tensor, Tensor, Tensor)"
    )
    for key in dispatch_keys:
        LIBRARY.impl(name, forward, key)
        LIBRARY.impl(f"{name}_backward", backward, key)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *rest = inputs
        layout = [argument for argument in rest if isinstance(argument, Tensor)]
        ctx.constants = rest[len(layout) :]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *output, *layout)

    def differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *layout = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        operation = getattr(torch.ops.sbp_kernels, f"{name}_backward")
        gradients = operation(dout, dlse, q, k, v, out, lse, *layout, *ctx.constants)
        return (*gradients, *[None] * (len(layout) + len(ctx.constants)))

    library.register_fake(f"sbp_kernels::{name}", _fake_forward, lib=LIBRARY)
    library.register_fake(f"sbp_kernels::{name}_backward", _fake_backward, lib=LIBRARY)
    library.register_autograd(f"sbp_kernels::{name}", differentiate, setup_context=save, lib=LIBRARY)


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)


def _fake_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
