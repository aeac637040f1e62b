"""Registration of an attention with PyTorch: two operations, forward and backward, tied by autograd.

Both are opaque to tracing, take tensors of fixed shapes and constants, and change none of their inputs, so that
`torch.compile(fullgraph=True)`, FakeTensor and activation checkpointing work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sbp_kernels._registration import register_operation

Gradients = tuple[Tensor, Tensor, Tensor]
Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., Gradients]


def register_attention(name: str, arguments: str, forward: Forward, backward: Backward) -> None:
    """Make `torch.ops.sbp_kernels.<name>` and `<name>_backward`.

    Args:
        name: of the operation.
        arguments: the schema of what follows q, k and v: tensors first, then constants.
        forward: (q, k, v, *arguments) -> out like q, lse [Hq, T] in float32 at least.
        backward: (dout, dlse or None, q, k, v, out, lse, *arguments) -> dq, dk, dv.
    """

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

    schema = f"{name}(Tensor q, Tensor k, Tensor v, {arguments}) -> (Tensor, Tensor)"
    register_operation(schema, forward, _fake_forward, backward=differentiate, save=save)
    register_operation(
        f"{name}_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {arguments})"
        " -> (Tensor, Tensor, Tensor)",
        backward,
        _fake_backward,
    )


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)


def _fake_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
