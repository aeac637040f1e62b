from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import IGNORED, MODES, inputs, plain_cross_entropy, with_gradients
from sbp_kernels import linear_cross_entropy
from sbp_kernels.linear_cross_entropy import cpu as plain
from sbp_kernels.linear_cross_entropy import loss_rows_of, select_loss_rows
from sbp_kernels.linear_cross_entropy.reference import linear_cross_entropy as exact_cross_entropy
from torch import Tensor
from trees import error


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "z_loss": draw(st.sampled_from([0.0, 0.3])),
        "softcap": draw(st.sampled_from([None, 2.5])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.2, 1.0])),
    }


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows and columns make several tiles in the torch form of `recompute`."""
    monkeypatch.setattr(plain, "TILE_ROWS", 7)
    monkeypatch.setattr(plain, "TILE_COLUMNS", 5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_equals_the_definition_in_float64_for_any_slab_and_any_options(small_tiles: None, mode: str, reduction: str) -> None:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 20), st.integers(1, 7), st.integers(1, 25), options(), st.booleans())
    def check(rows: int, slab: int, vocabulary: int, options: dict[str, Any], weighted: bool) -> None:
        hidden, weight, targets = inputs(rows, 6, vocabulary, torch.float64)
        targets[0] = 0  # a mean needs a row
        options = options | {"reduction": reduction, "row_weight": torch.rand(rows).double() if weighted else None}
        upstream = torch.randn(rows).double() if reduction == "none" else 0.37
        tensors = (hidden, weight, targets, upstream)
        found = with_gradients(linear_cross_entropy, *tensors, mode=mode, slab_rows=slab, **options)
        exact = with_gradients(exact_cross_entropy, *tensors, **options)
        for mine, right in zip(found, exact, strict=True):
            assert mine.shape == right.shape and error(mine, right) < 1e-13 * (1 + right.abs().max())

    check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errs_no_more_than_twice_a_plain_implementation(dtype: torch.dtype, spread: float, mode: str) -> None:
    tensors = inputs(600, 64, 500, dtype, spread)
    found = with_gradients(linear_cross_entropy, *tensors, mode=mode)
    plain = with_gradients(plain_cross_entropy, *tensors)
    exact = with_gradients(exact_cross_entropy, tensors[0].double(), tensors[1].double(), tensors[2])
    for mine, theirs, right in zip(found[1:], plain[1:], exact[1:], strict=True):
        assert error(mine, right) <= 2 * error(theirs, right)
    # one rounding of a sum may be lucky; its terms are not
    assert error(found[0], exact[0]) <= 2 * max(error(plain[0], exact[0]), torch.finfo(torch.float32).eps * found[0].item())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_rows_err_no_more_than_twice_a_plain_implementation(dtype: torch.dtype, mode: str) -> None:
    hidden, weight, targets = inputs(300, 64, 500, dtype)
    upstream = torch.randn(300).square()  # of any size

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")

    found = with_gradients(linear_cross_entropy, hidden, weight, targets, upstream, mode=mode, reduction="none", slab_rows=100)
    theirs = with_gradients(plain, hidden, weight, targets, upstream)
    exact = with_gradients(exact_cross_entropy, hidden.double(), weight.double(), targets, upstream.double(), reduction="none")
    for mine, other, right in zip(found, theirs, exact, strict=True):
        assert error(mine, right) <= 2 * error(other, right)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
def test_real_vocabularies(vocabulary: int, mode: str) -> None:
    tensors = inputs(3, 8, vocabulary, torch.float32)
    found = with_gradients(linear_cross_entropy, *tensors, mode=mode)
    plain = with_gradients(plain_cross_entropy, *tensors)
    exact = with_gradients(exact_cross_entropy, *tensors)
    for mine, theirs, right in zip(found[1:], plain[1:], exact[1:], strict=True):
        assert error(mine, right) <= 2 * error(theirs, right)
    assert abs(found[0] - exact[0]) <= 2 * torch.finfo(torch.float32).eps * exact[0]


@pytest.mark.parametrize("mode", MODES)
def test_logits_of_ten_thousand_do_not_overflow(mode: str) -> None:
    hidden = torch.tensor([[1e4, 0.0], [0.0, 1e4], [-1e4, 0.0]])
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
    targets = torch.tensor([0, 0, 1])
    found = with_gradients(linear_cross_entropy, hidden, weight, targets, mode=mode, reduction="none")
    exact = with_gradients(exact_cross_entropy, hidden, weight, targets, reduction="none")
    assert exact[0].max() > 1e4
    assert all(torch.equal(mine, right.float()) for mine, right in zip(found, exact, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("rows", [0, 5])
def test_without_any_loss_everything_is_zero(rows: int, reduction: str, mode: str) -> None:
    hidden, weight = torch.full((rows, 4), float("nan")), torch.randn(9, 4)
    targets = torch.full((rows,), IGNORED)
    for loss_rows in (None, torch.full((3,), rows, dtype=torch.int32)):
        found = with_gradients(
            linear_cross_entropy, hidden, weight, targets, mode=mode, reduction=reduction, loss_rows=loss_rows
        )
        assert found[0].shape == ((rows,) if reduction == "none" else ())
        assert all(torch.equal(x, torch.zeros_like(x)) for x in found)
        assert found[1].shape == hidden.shape and found[2].shape == weight.shape


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_rows_without_a_target_touch_nothing(reduction: str, mode: str) -> None:
    hidden, weight, targets = inputs(12, 6, 9, torch.float32)
    targets[3], targets[4] = IGNORED, 2
    row_weight = torch.rand(12)
    chosen = {"mode": mode, "reduction": reduction, "row_weight": row_weight, "label_smoothing": 0.1}
    clean = with_gradients(linear_cross_entropy, hidden, weight, targets, **chosen)
    poisoned, row_weight[3] = hidden.clone(), float("nan")
    poisoned[3] = float("nan")
    for mine, right in zip(with_gradients(linear_cross_entropy, poisoned, weight, targets, **chosen), clean, strict=True):
        assert torch.equal(mine, right)
    assert torch.equal(clean[1][3], torch.zeros(6)) and clean[1][4].abs().sum() > 0


@pytest.mark.parametrize("mode", MODES)
def test_rows_given_by_the_host_are_the_rows_that_are_found(mode: str) -> None:
    hidden, weight, targets = inputs(15, 6, 9, torch.float64)
    targets[2] = IGNORED
    expected = with_gradients(linear_cross_entropy, hidden, weight, targets, mode=mode)
    tight = loss_rows_of(targets, int((targets != IGNORED).sum()))
    wide = loss_rows_of(targets, 15)
    with_holes = torch.cat([torch.tensor([-1, 2]), tight.long(), torch.tensor([15, 99])])
    for loss_rows in (tight, wide, with_holes, tight.flip(0)):
        found = with_gradients(linear_cross_entropy, hidden, weight, targets, mode=mode, loss_rows=loss_rows)
        for mine, right in zip(found, expected, strict=True):
            assert error(mine, right) < 1e-13
    some = tight[1:]
    found = with_gradients(linear_cross_entropy, hidden, weight, targets, mode=mode, loss_rows=some)
    exact = with_gradients(exact_cross_entropy, hidden, weight, targets.index_fill(0, tight[:1].long(), IGNORED))
    assert all(error(mine, right) < 1e-13 for mine, right in zip(found, exact, strict=True))


def test_loss_rows_have_a_fixed_length() -> None:
    targets = torch.tensor([4, IGNORED, 0, IGNORED, 7])
    assert loss_rows_of(targets, 5).tolist() == [0, 2, 4, 5, 5] and loss_rows_of(targets, 5).dtype == torch.int32
    assert loss_rows_of(targets, 3).tolist() == [0, 2, 4]
    assert loss_rows_of(targets, 4, ignore_index=4).tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="3 rows carry loss, more than the capacity of 2"):
        loss_rows_of(targets, 2)


def test_layers_before_the_projection_can_run_on_the_rows_with_loss_alone() -> None:
    hidden, weight, targets = inputs(15, 6, 9, torch.float64)
    targets[0], hidden[0] = IGNORED, float("nan")
    loss_rows = loss_rows_of(targets, 15)

    def selected(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        hidden, targets = select_loss_rows(hidden, targets, loss_rows)
        return linear_cross_entropy(F.rms_norm(hidden, (6,)), weight, targets)

    def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return exact_cross_entropy(F.rms_norm(hidden, (6,)), weight, targets)

    found = with_gradients(selected, hidden, weight, targets)
    exact = with_gradients(whole, hidden.nan_to_num(1.0), weight, targets)
    assert all(error(mine, right) < 1e-13 for mine, right in zip(found, exact, strict=True))


def test_the_caller_normalises_by_a_scalar_on_the_device() -> None:
    hidden, weight, targets = inputs(12, 6, 9, torch.float64)
    exact = with_gradients(exact_cross_entropy, hidden, weight, targets, 1 / 7)
    exact[0] /= 7
    for normalizer in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
        found = with_gradients(linear_cross_entropy, hidden, weight, targets, normalizer=normalizer)
        assert all(error(mine, right) < 1e-14 for mine, right in zip(found, exact, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("given_as", ["upstream", "row_weight"])
@pytest.mark.parametrize(("factor", "hidden_size", "weight_size"), [(2.0**-17, 400, 1 / 800), (2.0**20, 1 / 400, 1 / 100)])
def test_float16_gradients_keep_their_precision(
    factor: float, hidden_size: float, weight_size: float, given_as: str, reduction: str, mode: str
) -> None:
    """A factor which takes the gradient of the logits out of the range of float16, but not the weight's gradient."""
    hidden, weight, targets = inputs(600, 8, 500, torch.float16)
    hidden, weight, factors = hidden * hidden_size, weight * weight_size, torch.full((600,), factor)

    def relative_error(factor: float, **options: Any) -> float:
        upstream = options.pop("upstream", 1.0)
        found = with_gradients(
            linear_cross_entropy, hidden, weight, targets, upstream, mode=mode, reduction=reduction, **options
        )
        exact = with_gradients(exact_cross_entropy, hidden.double(), weight.double(), targets, factor)
        return error(found[2], exact[2]) / exact[2].square().mean().sqrt().item()

    upstream = factors if given_as == "row_weight" or reduction == "none" else factor
    assert relative_error(factor, **{given_as: upstream}) <= 2 * relative_error(1.0)


def test_gradients_of_rows_are_right_beside_rows_without_any() -> None:
    hidden, weight, targets = inputs(12, 6, 9, torch.float64)
    upstream = torch.zeros(12).double()
    upstream[5], targets[5] = 3.0, 1
    for mode in MODES:
        found = with_gradients(linear_cross_entropy, hidden, weight, targets, upstream, mode=mode, reduction="none")
        exact = with_gradients(exact_cross_entropy, hidden, weight, targets, upstream, reduction="none")
        assert all(error(mine, right) < 1e-14 for mine, right in zip(found, exact, strict=True))
