"""No operation lets memory that is not its own, or that nothing has written, into a product."""

from contextlib import nullcontext

import pytest
import torch
from losses import MODES, inputs, with_gradients
from paged import batch
from products import hostile_memory, memory_beside
from sbp_kernels import (
    PackedLayout,
    decode_attention,
    linear_cross_entropy,
    nearest_in_buckets,
    packed_attention,
    swiglu_linear,
)
from torch import Tensor
from trees import error

DTYPES = [torch.float32, torch.bfloat16]


def amid_nan(x: Tensor) -> Tensor:
    """A view with the values of x whose neighbours in memory, on all sides, are NaN."""
    outer = torch.full([size + 2 for size in x.shape], float("nan"), dtype=x.dtype)
    view = outer[tuple(slice(1, -1) for _ in x.shape)]
    return view.copy_(x)


def test_stand_in_makes_a_product_beside_nan_nan() -> None:
    x = torch.randn(4, 6)
    with hostile_memory() as products:
        assert torch.mm(x[:, :3], x[:3, :2]).isfinite().all()
        assert torch.mm(amid_nan(x)[:, :3], x[:3]).isnan().all()
        assert torch.empty(3).isnan().all()
    assert products.count == 2
    assert len(memory_beside(amid_nan(x))) == 2 * 3 and len(memory_beside(x.T)) == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_with_padded_vocabulary_rows_is_the_same_in_hostile_memory(dtype: torch.dtype, reduction: str, mode: str) -> None:
    tensors = inputs(40, 16, 50, dtype)
    expected = with_gradients(linear_cross_entropy, *tensors, mode=mode, reduction=reduction, slab_rows=16)
    with hostile_memory() as products:
        found = with_gradients(linear_cross_entropy, *tensors, mode=mode, reduction=reduction, slab_rows=16)
    assert products.count >= 3
    assert all(torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_views_amid_nan_errs_no_more_than_over_copies(dtype: torch.dtype) -> None:
    layout = PackedLayout.from_tree([20, 7, 9, 28], [-1, 0, 0, -1])
    q, k, v, dout = (torch.randn(64, heads, 16).to(dtype) for heads in (4, 2, 2, 4))

    def attend(*leaves: Tensor) -> list[Tensor]:
        leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
        out = packed_attention(*leaves, layout, backend="torch")
        return [out, *torch.autograd.grad(out, leaves, amid_nan(dout.to(out.dtype)))]

    exact, copied = attend(q.double(), k.double(), v.double()), attend(q, k, v)
    with hostile_memory() if dtype == torch.bfloat16 else nullcontext():  # products in float32 read no padding
        found = attend(amid_nan(q), amid_nan(k), amid_nan(v))
    for mine, theirs, right in zip(found, copied, exact, strict=True):
        assert error(mine, right) <= 2 * error(theirs, right)


@pytest.mark.parametrize("mode", MODES)
def test_loss_with_a_weight_amid_nan_is_that_of_a_copy(mode: str) -> None:
    hidden, weight, targets = inputs(40, 16, 50, torch.bfloat16)
    results = []
    for view in (torch.clone, amid_nan):
        with hostile_memory():
            leaf = view(weight).requires_grad_()
            loss = linear_cross_entropy(hidden, leaf, targets, mode=mode)
            results.append([loss, *torch.autograd.grad(loss, leaf)])
    assert all(torch.equal(mine, right) for mine, right in zip(*results, strict=True))


def test_feed_forward_with_a_weight_amid_nan_is_that_of_a_copy() -> None:
    gate_up, weight = torch.randn(5, 12).bfloat16(), torch.randn(4, 6).bfloat16()
    with hostile_memory() as products:
        assert torch.equal(swiglu_linear(gate_up, amid_nan(weight)), swiglu_linear(gate_up, weight))
    assert products.count == 2


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention_over_pages_amid_nan_is_finite_in_hostile_memory(dtype: torch.dtype, stored: torch.dtype) -> None:
    rows = batch([(17, [5, 33]), (0, [16, 1])], dtype=dtype, stored=stored)
    expected = decode_attention(*rows.arguments, backend="torch")
    with hostile_memory() as products:
        found = decode_attention(*rows.arguments, backend="torch")
    assert products.count and found.isfinite().all() and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_neighbours_of_views_amid_nan_are_those_of_copies(dtype: torch.dtype) -> None:
    queries, members = torch.randn(6, 5).to(dtype), torch.randn(9, 5).to(dtype)
    own, buckets, starts = torch.full((6,), -1), torch.zeros(6, dtype=torch.int64), torch.tensor([0, 9])
    results = []
    for view in (torch.clone, amid_nan):
        scores, rows = torch.full((6, 3), -torch.inf), torch.full((6, 3), -1)
        with hostile_memory() as products:
            nearest_in_buckets(scores, rows, view(queries), own, buckets, view(members), starts, backend="torch")
        assert products.count
        results.append((scores, rows))
    assert all(torch.equal(mine, right) for mine, right in zip(*results, strict=True))
