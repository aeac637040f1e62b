"""Selective activation checkpointing keeps products and the attention of every registered backend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sbp_kernels import attention_operations, register_attention_backend
from sbp_kernels.attention import registry
from sbp_kernels.attention.cpu import segment_attention
from torch.utils.checkpoint import CheckpointPolicy

from sbp_fast.train.sharding import _save_costly_operations


def kept(operation: str) -> bool:
    policy = _save_costly_operations(attention_operations(), None, SimpleNamespace(name=lambda: operation))
    return policy == CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize(
    "operation",
    [
        "aten::mm",
        "aten::_scaled_mm",
        "sbp_kernels::packed_attention",
        "sbp_kernels::segment_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::fwd",
        "xformers_flash::flash_fwd",
        "aten::_efficient_attention_forward",
    ],
)
def test_products_and_attention_are_kept(operation: str) -> None:
    assert kept(operation)


@pytest.mark.parametrize("operation", ["aten::mul.Tensor", "aten::mm.out", "sbp_kernels::rotation"])
def test_other_operations_are_computed_again(operation: str) -> None:
    assert not kept(operation)


def test_the_operations_of_a_backend_registered_from_outside_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kept("mine::attend")
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    register_attention_backend("mine", segment_attention, operations=["mine::attend"])
    assert kept("mine::attend")
