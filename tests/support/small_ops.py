"""What the tests of the small operations share: how far an answer may be off, and memory that shows misuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from trees import error

FEW = 32  # numbers
MARGIN = 64  # elements before and after each guarded tensor
INTERPRETED = [torch.float32, torch.float16]  # what Triton's interpreter computes rightly


def with_gradients(operation: Callable[..., Any], leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of `operation(*leaves)`, then the gradients of the leaves for these gradients of the outputs."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = operation(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    gradients = torch.autograd.grad(outputs, leaves, [x.to(out.dtype) for x, out in zip(upstream, outputs, strict=True)])
    return [x.detach() for x in (*outputs, *gradients)]


def check_errors(found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Each result errs at most twice as much as a plain implementation in its dtype, or as rounding the exact result.

    Of few numbers the other's error is a matter of luck, which differs between processors: one unit in the last place is
    allowed there in any case.
    """
    for index, (mine, theirs, right) in enumerate(zip(found, plain, exact, strict=True)):
        assert mine.shape == right.shape and mine.dtype == theirs.dtype
        if not right.numel():
            continue
        allowed = 2 * max(error(theirs, right), error(right.to(mine.dtype), right), unit(mine) if right.numel() < FEW else 0)
        assert error(mine, right) <= allowed, f"result {index} of {tuple(right.shape)}: {error(mine, right)} > {allowed}"


def strided(x: Tensor) -> Tensor:
    """Return x as a slice of a bigger tensor, NaN around it."""
    bigger = torch.full((*x.shape[:-1], x.shape[-1] + 7), float("nan"), dtype=x.dtype, device=x.device)
    view = bigger[..., 3:-4]
    view.copy_(x)
    return view


def unit(x: Tensor) -> float:
    """One unit in the last place of numbers of the size of x."""
    return torch.finfo(x.dtype).eps * x.double().square().mean().sqrt().item()


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Floating-point tensors of `torch.empty` begin as NaN between margins of NaN, which must be untouched in the end."""
    empty, allocated = torch.empty, []

    def guarded(*arguments: Any, **options: Any) -> Tensor:
        wanted = empty(*arguments, **{**options, "device": "meta"})
        if not wanted.is_floating_point():
            return empty(*arguments, **options)
        memory = torch.full((wanted.numel() + 2 * MARGIN,), float("nan"), dtype=wanted.dtype, device=options.get("device"))
        allocated.append(memory)
        return memory[MARGIN : MARGIN + wanted.numel()].view(wanted.shape)

    with mock.patch("torch.empty", guarded):
        yield
    assert allocated
    for memory in allocated:
        assert memory[:MARGIN].isnan().all() and memory[-MARGIN:].isnan().all(), "written outside of a tensor"
