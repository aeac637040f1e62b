"""Layouts, inputs and exact answers shared by the tests of third-party attention backends."""

import importlib.machinery
import sys
import types
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from sbp_kernels import PackedLayout, attention_backends
from sbp_kernels.attention import fused
from sbp_kernels.attention.reference import packed_attention as exact_attention
from sbp_kernels.attention.registry import find_backend
from sbp_kernels.layout.reference import dense_mask
from torch import Tensor
from trees import error, rounding

SCALE = 0.3
HEADS = st.sampled_from([(4, 4), (4, 2), (3, 1)])
THIRD_PARTY = [name for name in attention_backends() if name not in ("torch", *fused.KERNELS)]
DOCUMENTS_ALONE = ["varlen", "flash-attn", "xformers"]
LAYOUTS = {
    "one": PackedLayout.from_lengths([40]),
    "documents": PackedLayout.from_lengths([7, 1, 30, 2]),
    "pairs": PackedLayout.from_pairs([(5, 9), (1, 1), (16, 8)]),
    "chains": PackedLayout.from_tree([3, 4, 5, 6, 22], [-1, 0, 1, -1, 3]),
}
SHARED_SEED = PackedLayout.from_tree([4, 3, 5], [-1, 0, 0])


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """Make a module of that name importable for the length of a test."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def on_the_device_alone() -> PackedLayout:
    """Documents of 9, 11 and 20 tokens as if their `cu_seqlens` had been on a device."""
    on_host = PackedLayout.from_lengths([9, 11, 20])
    return replace(on_host, lengths=None, parents=None, cu_seqlens=torch.tensor([0, 9, 20, 40, 40], dtype=torch.int32))


def inputs(tokens: int, heads: tuple[int, int], dtype: torch.dtype, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, count, width) for count in (heads[0], heads[1], heads[1], heads[0])]  # q, k, v, gradient of the output
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out))]


def run(name: str, layout: PackedLayout) -> Callable[..., Tensor]:
    return lambda q, k, v: find_backend(name).attend(q, k, v, layout, SCALE, False)[0]


def exact(layout: PackedLayout) -> Callable[..., Tensor]:
    return lambda q, k, v: exact_attention(q, k, v, layout, SCALE)


def torch_operation(layout: PackedLayout) -> Callable[..., Tensor]:
    """What torch itself has for any mask, in the inputs' own dtype."""
    mask = dense_mask(layout)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask.to(q.device), scale=SCALE, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    return attention


def log_sum_exp(q: Tensor, k: Tensor, layout: PackedLayout) -> Tensor:
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * SCALE
    return scores.masked_fill(~dense_mask(layout).to(q.device), float("-inf")).logsumexp(-1)


def assert_accurate(found: list[Tensor], torchs: list[Tensor], right: list[Tensor]) -> None:
    """Errors from float64 are at most twice those of torch's operation."""
    for mine, theirs, wanted in zip(found, torchs, right, strict=True):
        assert error(mine, wanted) <= 2 * max(error(theirs, wanted), rounding(wanted, mine.dtype))
