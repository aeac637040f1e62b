"""The backends of `packed_attention`, by name; each is registered beside its code, or by a user of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sbp_kernels.layout import PackedLayout

# (q, k, v, layout, softmax_scale, whether lse is wanted) -> out, lse or None
Attention = Callable[[Tensor, Tensor, Tensor, PackedLayout, float, bool], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention; see `register_attention_backend`."""

    attend: Attention
    operations: tuple[str, ...]
    check_device: Callable[[torch.device], object] | None


_BACKENDS: dict[str, AttentionBackend] = {}


def register_attention_backend(
    name: str,
    attend: Attention,
    *,
    operations: Sequence[str] = (),
    check_device: Callable[[torch.device], object] | None = None,
) -> None:
    """Make `attend` a backend of `packed_attention`.

    Args:
        name: value of the argument `backend` that selects it.
        attend: (q [T, Hq, D], k and v [T, Hkv, D], layout, softmax_scale, whether lse is wanted) -> out [T, Hq, D], and lse
            [Hq, T] or None where there is none. Shapes, dtypes and devices have been checked to agree.
        operations: prefixes of the names of the PyTorch operations that it calls, such as "sbp_kernels::packed_attention".
            Selective activation checkpointing keeps their results; those of a backend without any are computed again.
        check_device: raises ValueError where the backend cannot run on a device.

    Raises:
        ValueError: the name is taken.
    """
    if name == "auto" or name in _BACKENDS:
        raise ValueError(f"attention backend {name!r} is registered already: choose another name")
    _BACKENDS[name] = AttentionBackend(attend, tuple(operations), check_device)


def attention_backends() -> tuple[str, ...]:
    """Names of the registered backends; "auto" stands for one of them."""
    return tuple(_BACKENDS)


def attention_operations() -> tuple[str, ...]:
    """Prefixes of the names of the PyTorch operations that the registered backends call."""
    return tuple(operation for backend in _BACKENDS.values() for operation in backend.operations)


def find_backend(name: str) -> AttentionBackend:
    """Return the backend registered under a name.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend {name!r} is unknown: use auto, {', '.join(_BACKENDS)}")
    return _BACKENDS[name]
