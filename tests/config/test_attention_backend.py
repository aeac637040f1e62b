"""The attention of a training run: a name registered with the kernels."""

import sys

import pytest
from sbp_kernels import attention_backends, register_attention_backend
from sbp_kernels.attention import registry
from sbp_kernels.attention.cpu import segment_attention

from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError


def chosen(name: str) -> str:
    return load_config([], [f"pretrain.attention={name}"]).pretrain.attention


def test_attention_accepts_every_registered_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    register_attention_backend("mine", segment_attention)
    assert "mine" in attention_backends()
    assert [chosen(name) for name in ("auto", *attention_backends())] == ["auto", *attention_backends()]


def test_unknown_attention_backend_is_refused_with_the_known_names() -> None:
    with pytest.raises(UserError, match=r"pretrain.attention = mine is not usable: Input should be one of 'auto', .*'varlen'"):
        chosen("mine")


def test_attention_without_the_kernels_accepts_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sbp_kernels", None)
    assert chosen("mine") == "mine"
