"""Attention backends by name: one registered from outside runs; duplicate and unknown names are one clear error."""

from __future__ import annotations

import pytest
import torch
from sbp_kernels import (
    PackedLayout,
    attention_backends,
    attention_operations,
    packed_attention,
    register_attention_backend,
    resolve_backend,
)
from sbp_kernels.attention import registry
from sbp_kernels.attention.cpu import segment_attention
from torch import Tensor


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))


def twice(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, softmax_scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    return 2 * segment_attention(q, k, v, layout, softmax_scale, return_lse)[0], None


def test_a_backend_registered_from_outside_runs_and_its_operations_are_known() -> None:
    register_attention_backend("twice", twice, operations=["mine::twice"])
    layout = PackedLayout.from_lengths([3, 2])
    q, k, v = torch.randn(3, 5, 2, 16)
    assert torch.equal(packed_attention(q, k, v, layout, backend="twice"), 2 * packed_attention(q, k, v, layout))
    with pytest.raises(ValueError, match="backend 'twice' does not give lse"):
        packed_attention(q, k, v, layout, backend="twice", return_lse=True)
    assert "twice" in attention_backends() and "mine::twice" in attention_operations()


def test_a_device_that_the_backend_refuses_is_an_error() -> None:
    def refuse(device: torch.device) -> None:
        raise ValueError(f"not on {device.type}")

    register_attention_backend("twice", twice, check_device=refuse)
    with pytest.raises(ValueError, match="not on cpu"):
        resolve_backend("twice", "cpu")


@pytest.mark.parametrize("name", ["torch", "auto"])
def test_a_name_registered_twice_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"attention backend '{name}' is registered already"):
        register_attention_backend(name, twice)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"backend 'twice' is unknown: use auto, .*varlen.*triton"):
        resolve_backend("twice", "cpu")


def test_every_backend_of_the_package_names_its_operations() -> None:
    ours = {"torch", "triton", "triton-hopper", "gluon-hopper"}
    names = ours | {"sdpa", "flex", "varlen", "flash-attn", "xformers", "flash-attn-4"}
    assert names == set(attention_backends())
    without = {name for name, backend in registry._BACKENDS.items() if not backend.operations}
    assert without == {"flash-attn-4"}  # which calls its kernels directly
