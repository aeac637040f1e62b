"""`flash_attn_varlen_func` against `packed_attention` and SDPA, document by document."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sbp_kernels import PackedLayout, flash_attn_varlen_func, integrations, packed_attention
from torch import Tensor

LENGTHS = [7, 1, 12, 4]
ENDS = [0, 7, 8, 20, 24]


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(24, heads, 16, generator=generator).requires_grad_() for heads in (4, 2, 2)]


def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    ends = torch.tensor(ENDS, dtype=torch.int32)
    arguments = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 12, "max_seqlen_k": 12, "causal": True}
    return flash_attn_varlen_func(q, k, v, **arguments | options)


def by_document(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    parts = [
        F.scaled_dot_product_attention(
            *(x[start:end].transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=scale, enable_gqa=True
        )
        for start, end in pairwise(ENDS)
    ]
    return torch.cat(parts, 1).transpose(0, 1)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_output_and_gradients_are_those_of_sdpa_for_each_document(scale: float | None) -> None:
    leaves = inputs()
    upstream = torch.randn(24, 4, 16)
    out, right = call(*leaves, softmax_scale=scale), by_document(*leaves, scale)
    torch.testing.assert_close(out, right)
    for mine, wanted in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (out, right)), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_output_and_log_sum_exp_are_those_of_packed_attention() -> None:
    leaves = inputs()
    out, lse = packed_attention(*leaves, PackedLayout.from_lengths(LENGTHS), return_lse=True)
    for options in (
        {},
        {"window_size": (-1, 0)},
        {"deterministic": True},
        {"cu_seqlens_k": torch.tensor(ENDS, dtype=torch.int32)},
    ):
        mine, mine_lse, probabilities = call(*leaves, return_attn_probs=True, **options)
        assert torch.equal(mine, out) and torch.equal(mine_lse, lse) and probabilities is None


def test_positional_arguments_stand_where_flash_attn_has_them() -> None:
    leaves, ends = inputs(), torch.tensor(ENDS, dtype=torch.int32)
    assert torch.equal(flash_attn_varlen_func(*leaves, ends, ends, 12, 12, 0.0, 0.3, True), call(*leaves, softmax_scale=0.3))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dropout_p": 0.1}, "dropout_p"),
        ({"causal": False}, "causal=False"),
        ({"window_size": (64, 0)}, "window_size"),
        ({"softcap": 30.0}, "softcap"),
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes"),
        ({"block_table": torch.zeros(1, 1, dtype=torch.int32)}, "block_table"),
        ({"softcap": 30.0, "dropout_p": 0.1}, "dropout_p, softcap"),
    ],
)
def test_an_option_that_is_not_supported_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"packed attention does not support {named}: "):
        call(*inputs(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_seqlen_k": 13},
        {"cu_seqlens_k": torch.tensor([0, 24], dtype=torch.int32)},
        {"cu_seqlens_k": torch.tensor([0, 6, 8, 20, 24], dtype=torch.int32)},
    ],
)
def test_keys_of_other_lengths_than_the_queries_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens_q and cu_seqlens_k must be equal"):
        call(*inputs(), **options)
    q, k, v = inputs()
    with pytest.raises(ValueError, match="cu_seqlens_q and cu_seqlens_k must be equal"):
        call(q[:20], k, v)


def test_ends_that_changed_in_place_are_compared_again() -> None:
    first, second = (torch.tensor(ENDS, dtype=torch.int32) for _ in range(2))
    leaves = inputs()
    call(*leaves, cu_seqlens_q=first, cu_seqlens_k=second)
    second[1] = 6
    with pytest.raises(ValueError, match="cu_seqlens_q and cu_seqlens_k must be equal"):
        call(*leaves, cu_seqlens_q=first, cu_seqlens_k=second)


def test_the_layout_is_made_once_for_all_calls_with_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = PackedLayout.from_cu_seqlens

    def counted(*arguments: Any, **options: Any) -> PackedLayout:
        made.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(integrations.PackedLayout, "from_cu_seqlens", staticmethod(counted))
    for pair in ([torch.tensor(ENDS, dtype=torch.int32)] * 2, [torch.tensor(ENDS, dtype=torch.int32) for _ in range(2)]):
        made.clear()
        for _ in range(3):
            call(*inputs(), cu_seqlens_q=pair[0], cu_seqlens_k=pair[1])
        assert len(made) == 1
