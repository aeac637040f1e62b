import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sbp_kernels import linear_cross_entropy
from sbp_kernels.reference import linear_cross_entropy as exact_cross_entropy
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from trees import error


def inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(shape, generator=generator) * spread for shape in ((rows, width), (vocabulary, width)))
    targets = torch.randint(-1, vocabulary, (rows,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets.where(targets >= 0, -100)


def with_gradients(loss, hidden: Tensor, weight: Tensor, targets: Tensor, factor: float = 1.0) -> list[Tensor]:
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    value = loss(*leaves, targets) * factor
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20), st.integers(1, 7), st.integers(1, 25))
def test_equals_the_definition_in_float64_for_any_slab(rows: int, slab: int, vocabulary: int) -> None:
    tensors = inputs(rows, 6, vocabulary, torch.float64)
    found = with_gradients(lambda *x: linear_cross_entropy(*x, slab_rows=slab), *tensors, factor=0.37)
    exact = with_gradients(exact_cross_entropy, *tensors, factor=0.37)
    for mine, right in zip(found, exact, strict=True):
        assert rows == 0 or error(mine, right) < 1e-13


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errs_no_more_than_twice_a_plain_implementation(dtype: torch.dtype, spread: float) -> None:
    tensors = inputs(600, 64, 500, dtype, spread)
    found = with_gradients(linear_cross_entropy, *tensors)
    plain = with_gradients(plain_cross_entropy, *tensors)
    exact = with_gradients(exact_cross_entropy, tensors[0].double(), tensors[1].double(), tensors[2])
    for mine, theirs, right in zip(found[1:], plain[1:], exact[1:], strict=True):
        assert error(mine, right) <= 2 * error(theirs, right)
    # one rounding of a sum may be lucky; its terms are not
    assert error(found[0], exact[0]) <= 2 * max(error(plain[0], exact[0]), torch.finfo(torch.float32).eps * found[0].item())


def test_rows_without_a_target_touch_nothing() -> None:
    hidden, weight, targets = inputs(12, 6, 9, torch.float32)
    targets[3] = -100
    hidden[3] = float("nan")
    loss, hidden_gradient, weight_gradient = with_gradients(linear_cross_entropy, hidden, weight, targets)
    assert loss.isfinite() and weight_gradient.isfinite().all()
    assert torch.equal(hidden_gradient[3], torch.zeros(6))


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs(40, 6, 9, torch.float32, spread=100.0)
    assert all(x.isfinite().all() for x in with_gradients(linear_cross_entropy, hidden, weight, targets))


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    hidden, weight, targets = inputs(12, 6, 9, torch.float32)
    weight.requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, targets)
    assert counter.get_total_flops() == 2 * (targets >= 0).sum().item() * 6 * 9


def test_autocast_multiplies_in_its_dtype() -> None:
    hidden, weight, targets = inputs(12, 6, 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *gradients = with_gradients(linear_cross_entropy, hidden, weight, targets)
    rounded = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert loss == rounded and all(gradient.dtype == torch.float32 for gradient in gradients)


def test_bad_input_is_refused() -> None:
    hidden, weight, targets = inputs(4, 6, 9, torch.float32)
    for arguments, message in [
        ((hidden, weight[:, :5], targets), "do not fit"),
        ((hidden, weight, targets[:3]), "do not fit"),
        ((hidden, weight, targets.int()), "targets must be int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments)
    with pytest.raises(ValueError, match="slab_rows"):
        linear_cross_entropy(hidden, weight, targets, slab_rows=0)
