import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sbp_kernels import PackedLayout, packed_attention
from sbp_kernels.reference import dense_mask
from sbp_kernels.reference import packed_attention as exact_attention
from torch import Tensor
from trees import error, trees

HEADS = st.sampled_from([(4, 4), (4, 2), (2, 1)])


def inputs(tokens: int, heads: tuple[int, int], dtype: torch.dtype, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, count, width) for count in (heads[0], heads[1], heads[1], heads[0])]  # q, k, v, gradient of the output
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(attention, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype))]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """The same in the inputs' own dtype, one torch op after the other."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[2])
    weights = scores.masked_fill(~dense_mask(layout), float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


@settings(max_examples=30, deadline=None)
@given(trees(), HEADS)
def test_equals_the_definition_in_float64(layout: PackedLayout, heads: tuple[int, int]) -> None:
    tensors = inputs(len(layout), heads, torch.float64)
    found = with_gradients(lambda *qkv: packed_attention(*qkv, layout), *tensors)
    exact = with_gradients(lambda *qkv: exact_attention(*qkv, layout), *tensors)
    for mine, right in zip(found, exact, strict=True):
        assert error(mine, right) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errs_no_more_than_twice_a_plain_implementation(dtype: torch.dtype) -> None:
    layout = PackedLayout.from_tree([150, 90, 70, 200, 33], [-1, 0, 0, -1, 3])
    tensors = inputs(len(layout), (4, 2), dtype, width=32)
    found = with_gradients(lambda *qkv: packed_attention(*qkv, layout), *tensors)
    plain = with_gradients(lambda *qkv: plain_attention(*qkv, layout), *tensors)
    exact = with_gradients(lambda *qkv: exact_attention(*qkv, layout), *(x.double() for x in tensors))
    for mine, theirs, right in zip(found, plain, exact, strict=True):
        assert error(mine, right) <= 2 * error(theirs, right)


@settings(max_examples=20, deadline=None)
@given(trees(), st.data())
def test_a_token_changes_nothing_that_must_not_see_it(layout: PackedLayout, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(layout) - 1))
    q, k, v, _ = inputs(len(layout), (2, 1), torch.float32)
    before = packed_attention(q, k, v, layout)
    for x in (q, k, v):
        x[token] += 1.0
    changed = (packed_attention(q, k, v, layout) != before).flatten(1).any(1)
    assert torch.equal(changed, dense_mask(layout)[:, token])


def test_scale_and_an_empty_stream() -> None:
    q, k, v, _ = inputs(5, (2, 2), torch.float64)
    layout = PackedLayout.from_lengths([5])
    right = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=0.3).transpose(0, 1)
    assert error(packed_attention(q, k, v, layout, scale=0.3), right) < 1e-14
    assert packed_attention(q[:0], k[:0], v[:0], PackedLayout.from_lengths([])).shape == (0, 2, 8)


def test_bad_input_is_refused() -> None:
    q, k, v, _ = inputs(6, (4, 2), torch.float32)
    layout = PackedLayout.from_lengths([6])
    for arguments, message in [
        ((q, k, v[:, :1], layout), "k and v alike"),
        ((q, k, v, PackedLayout.from_lengths([5])), "differ in tokens: 6, 6, 5"),
        ((q[:, :3], k, v, layout), "heads of q must be a multiple"),
        ((q[..., :4], k, v, layout), "widths equal"),
        ((q.double(), k, v, layout), "share dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_attention(*arguments)
    with pytest.raises(ValueError, match="backend 'triton' is unknown"):
        packed_attention(q, k, v, layout, backend="triton")
