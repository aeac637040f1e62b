"""The Triton kernels of `linear_cross_entropy`, in the interpreter where there is no GPU."""

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from losses import IGNORED, MODES, inputs, plain_cross_entropy, with_gradients
from sbp_kernels import linear_cross_entropy
from sbp_kernels.linear_cross_entropy import cpu as plain
from sbp_kernels.linear_cross_entropy import launch, loss_rows_of
from sbp_kernels.linear_cross_entropy import operations as implementations
from sbp_kernels.linear_cross_entropy.reference import linear_cross_entropy as exact_cross_entropy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from trees import error
from triton.runtime.interpreter import InterpreterBuilder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]  # the interpreter multiplies bfloat16 wrongly
TILE = {"ROWS": 16, "COLUMNS": 32, "INNER": 16, "GROUP": 2, "PRECISION": "ieee", "num_warps": 4, "num_stages": 1}


@pytest.fixture(autouse=True)
def small_and_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of which small inputs have several, and NaN in all memory that a kernel is to fill."""

    def poisoned(*arguments: Any, **named: Any) -> Tensor:
        out = allocate(*arguments, **named)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", poisoned)
    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "product_options", lambda *_: TILE)
        monkeypatch.setattr(launch, "slab_options", lambda _: {"BLOCK": 64, "num_warps": 4, "num_stages": 1})
        monkeypatch.setattr(launch, "row_options", lambda _: {"BLOCK": 32, "num_warps": 4, "num_stages": 1})
    monkeypatch.setattr(launch, "panel_columns", lambda *_: 64)
    monkeypatch.setattr(launch, "SPLITS", 2)


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "z_loss": draw(st.sampled_from([0.0, 0.3])),
        "softcap": draw(st.sampled_from([None, 2.5])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.2])),
        "reduction": draw(st.sampled_from(["sum", "none"])),
    }


def plain_with_options(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """One torch op after the other, in the dtype of the inputs up to the logits and in float32 from there."""
    logits = (hidden @ weight.T).float()
    if options["softcap"] is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    losses = torch.nn.functional.cross_entropy(
        logits, targets, reduction="none", label_smoothing=options["label_smoothing"], ignore_index=IGNORED
    )
    losses = losses + options["z_loss"] * logits.logsumexp(1).square().where(targets != IGNORED, 0)
    return losses if options["reduction"] == "none" else losses.sum()


JUDGED_ROWS = 12


def check_against_plain(found: list[Tensor], plain: list[Tensor], exact: list[Tensor], few: bool = False) -> None:
    """Loss and gradients err at most twice as much as one torch op after the other does.

    Where numbers are few, and always of sums, the other's roundings may be lucky: one rounding is allowed in any case.
    """
    for mine, theirs, right in zip(found, plain, exact, strict=True):
        rounding = torch.finfo(mine.dtype).eps * right.square().mean().sqrt().item() if few or mine.dim() <= 1 else 0
        assert error(mine, right) <= 2 * max(error(theirs, right), rounding)


def check(rows: int, width: int, vocabulary: int, mode: str, dtype: torch.dtype, tight: bool, options: dict[str, Any]) -> None:
    """Of inputs of any shape, with NaN in the rows without loss; of very few rows several draws, as one is judged by luck."""
    kinds: list[list[list[Tensor]]] = [[], [], []]
    for seed in range(-(-JUDGED_ROWS // rows)):
        hidden, weight, targets = on_device(*inputs(rows, width, vocabulary, dtype, spread=0.6, seed=seed))
        targets[:: max(rows - 1, 1)], targets[1:2] = vocabulary - 1, IGNORED
        upstream = hidden[:, 0].float() if options["reduction"] == "none" else 0.37
        poisoned = hidden.masked_fill((targets == IGNORED).unsqueeze(1), float("nan"))
        loss_rows = loss_rows_of(targets.cpu(), rows).to(DEVICE) if tight else None
        how = {"backend": "triton", "mode": mode, "slab_rows": 17, "loss_rows": loss_rows}
        kinds[0].append(with_gradients(linear_cross_entropy, poisoned, weight, targets, upstream, **how, **options))
        kinds[1].append(with_gradients(plain_with_options, hidden, weight, targets, upstream, **options))
        kinds[2].append(with_gradients(exact_cross_entropy, hidden.double(), weight.double(), targets, upstream, **options))
        assert torch.equal(kinds[0][-1][1][targets == IGNORED], torch.zeros_like(hidden[targets == IGNORED]))
    found, theirs, exact = ([torch.stack(draws) for draws in zip(*kind, strict=True)] for kind in kinds)
    check_against_plain(found, theirs, exact, few=rows < 40)


OPTIONS = [
    {"z_loss": 0.0, "softcap": None, "label_smoothing": 0.0, "reduction": "sum"},
    {"z_loss": 0.3, "softcap": 2.5, "label_smoothing": 0.2, "reduction": "sum"},
    {"z_loss": 0.3, "softcap": None, "label_smoothing": 0.0, "reduction": "none"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_errs_no_more_than_twice_a_plain_implementation(mode: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    check(40, 40, 100, mode, dtype, False, options)


@pytest.mark.parametrize("examples", [2, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_any_shape_and_any_options(mode: str, dtype: torch.dtype, examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
    )  # shrinking takes minutes
    @given(st.integers(1, 39), st.sampled_from([8, 24, 40]), st.integers(2, 150), st.booleans(), options())
    def any_of(rows: int, width: int, vocabulary: int, tight: bool, options: dict[str, Any]) -> None:
        check(rows, width, vocabulary, mode, dtype, tight, options)

    any_of()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_on_the_device(mode: str, dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # real tiles
    for softcap, smoothing in ((None, 0.0), (20.0, 0.1)):
        hidden, weight, targets = on_device(*inputs(3000, 512, 20_001, dtype, spread=0.3))
        targets[::2] = IGNORED
        options = {"softcap": softcap, "label_smoothing": smoothing, "z_loss": 1e-3, "reduction": reduction}
        upstream = torch.randn(3000, device=DEVICE) if reduction == "none" else 0.37
        found = with_gradients(linear_cross_entropy, hidden, weight, targets, upstream, mode=mode, **options)
        theirs = with_gradients(plain_with_options, hidden, weight, targets, upstream, **options)
        exact = with_gradients(exact_cross_entropy, hidden.double(), weight.double(), targets, upstream, **options)
        check_against_plain(found, theirs, exact)
        again = with_gradients(linear_cross_entropy, hidden, weight, targets, upstream, mode=mode, **options)
        assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_no_host_device_synchronisation(mode: str) -> None:
    hidden, weight, targets = on_device(*inputs(300, 64, 500, torch.bfloat16))
    with_gradients(linear_cross_entropy, hidden, weight, targets, mode=mode)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(linear_cross_entropy, hidden, weight, targets, mode=mode, row_weight=torch.rand(300, device=DEVICE))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocabulary", [49_152, pytest.param(151_936, marks=pytest.mark.slow)])
def test_real_vocabularies(vocabulary: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "product_options", lambda *_: TILE | {"ROWS": 128, "COLUMNS": 512, "INNER": 128})
        monkeypatch.setattr(launch, "slab_options", lambda _: {"BLOCK": 4096, "num_warps": 4, "num_stages": 1})
    monkeypatch.setattr(launch, "panel_columns", lambda *_: 65_536)
    hidden, weight, targets = on_device(*inputs(3, 8, vocabulary, torch.float32))
    targets[1] = vocabulary - 1
    found = with_gradients(linear_cross_entropy, hidden, weight, targets, mode=mode, backend="triton")
    theirs = with_gradients(plain_cross_entropy, hidden, weight, targets)
    exact = with_gradients(exact_cross_entropy, hidden.double(), weight.double(), targets)
    check_against_plain(found, theirs, exact, few=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_logits_of_ten_thousand_do_not_overflow(mode: str, reduction: str) -> None:
    hidden = torch.tensor([[1e4, 0.0, 0, 0], [0.0, 1e4, 0, 0], [-1e4, 0.0, 0, 0]])
    weight = torch.tensor([[1.0, -1.0, 0, 0], [-1.0, 1.0, 0, 0], [1.0, 1.0, 0, 0]]).repeat(20, 1)
    tensors = on_device(hidden, weight, torch.tensor([0, 51, 58]))
    found = with_gradients(linear_cross_entropy, *tensors, mode=mode, backend="triton", reduction=reduction)
    theirs = with_gradients(plain_cross_entropy, *tensors)
    exact = with_gradients(exact_cross_entropy, *tensors, reduction=reduction)
    assert exact[0].max() > 1e4
    for mine, right, other in zip(found, exact, theirs, strict=True):
        scale = torch.finfo(torch.float32).eps * right.abs().max().item()
        assert error(mine, right) <= 2 * max(scale, error(other, right) if other.shape == right.shape else 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_without_any_loss_everything_is_zero(reduction: str, mode: str) -> None:
    weight, targets = torch.randn(40, 8, device=DEVICE), torch.full((20,), IGNORED, device=DEVICE)
    hidden = torch.full((20, 8), float("nan"), device=DEVICE)
    for loss_rows in (None, targets[:0].int(), targets[:3].int() + 120):
        how = {"mode": mode, "reduction": reduction, "loss_rows": loss_rows, "backend": "triton"}
        found = with_gradients(linear_cross_entropy, hidden, weight, targets, **how)
        assert all(torch.equal(x, torch.zeros_like(x)) for x in found)


@pytest.mark.parametrize("mode", MODES)
def test_targets_outside_the_vocabulary_make_the_loss_nan_on_a_device(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "_check_targets", lambda *_: None)
    hidden, weight, targets = on_device(*inputs(20, 8, 40, torch.float32))
    targets[3:5] = torch.tensor([40, -7])
    for backend in ("triton", "torch"):
        losses = linear_cross_entropy(hidden, weight, targets, mode=mode, reduction="none", backend=backend)
        assert losses.isnan().nonzero().flatten().tolist() == [3, 4]


def test_gather_and_scatter_leave_out_rows_that_are_none() -> None:
    source = torch.randn(7, 40, device=DEVICE)
    strided, turned = source.repeat(1, 2)[:, :40], source.T.contiguous().T
    rows = torch.tensor([6, 7, 0, 3, 7], dtype=torch.int32, device=DEVICE)
    expected = plain.gather(source, rows)
    assert torch.equal(expected[[0, 2, 3]], source[[6, 0, 3]]) and not expected[[1, 4]].any()
    assert torch.equal(launch.gather(strided, rows), expected) and torch.equal(launch.gather(turned, rows), expected)
    for scale in (None, torch.tensor([0.5], device=DEVICE)):
        for step in (launch, plain):
            out = torch.zeros(7, 40, dtype=torch.float16, device=DEVICE)
            step.scatter(out, rows, strided[:5], scale)
            wanted = (strided * (1 if scale is None else scale)).half()
            assert torch.equal(out[[6, 0, 3]], wanted[[0, 2, 3]]) and not out[[1, 2, 4, 5]].any()


@pytest.mark.skipif(DEVICE != "cpu", reason="tiles are small, and products counted, in the interpreter alone")
def test_tiles_of_rows_beyond_the_count_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = inputs(60, 16, 70, torch.float32)
    targets = torch.arange(60).where(torch.arange(60) < 21, IGNORED)
    products = []

    def counted(*arguments: Any) -> Any:
        products.append(1)
        return multiply(*arguments)

    def gather(source: Tensor, rows: Tensor) -> Tensor:
        out = plain.gather(source, rows)
        out[32:] = float("nan")  # from the first tile on that has no row with loss
        return out

    multiply = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    monkeypatch.setattr(launch, "gather", gather)
    exact = with_gradients(exact_cross_entropy, hidden, weight, targets)
    judge = with_gradients(plain_cross_entropy, hidden, weight, targets)
    numbers = []
    for loss_rows in (loss_rows_of(targets, 21), None):
        products.clear()
        how = {"mode": "recompute", "backend": "triton", "loss_rows": loss_rows}
        found = with_gradients(linear_cross_entropy, hidden, weight, targets, **how)
        numbers.append(len(products))
        for mine, theirs, right in zip(found, judge, exact, strict=True):
            assert error(mine, right) <= 2 * max(error(theirs, right), error(right.float(), right))
    assert numbers[0] == numbers[1] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_the_host_reads_no_number_from_the_device(mode: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FakeTensor has none to read, and says so: in the function, in its operations and in the launchers."""
    launches = []

    class Recorder(dict[Any, Any]):
        def __missing__(self, grid: Any) -> Any:
            return lambda *arguments, **options: launches.append(grid)

    for name in [name for name in vars(launch.kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(launch.kernels, name, Recorder())
    monkeypatch.setattr(launch, "_tiles", lambda tensor, *_: tensor)
    monkeypatch.setattr(launch, "_aligned", lambda weight: weight)
    monkeypatch.setattr(plain, "multiplied", lambda rows, count: len(rows))  # as on a device
    monkeypatch.setattr(implementations, "_check_targets", lambda *_: None)
    with FakeTensorMode(), torch.device(DEVICE):
        hidden, weight = torch.zeros(20, 8, requires_grad=True), torch.zeros(30, 8, requires_grad=True)
        targets, row_weight = torch.zeros(20, dtype=torch.int64), torch.zeros(20)
        for loss_rows in (None, torch.zeros(9, dtype=torch.int32)):
            how = {"loss_rows": loss_rows, "row_weight": row_weight, "reduction": reduction, "mode": mode}
            loss = linear_cross_entropy(hidden, weight, targets, backend="triton", **how)
            loss.sum().backward()
        tensors = (hidden.detach(), weight.detach(), targets.int(), targets.int(), targets.sum().int())
        if mode == "slab" and reduction != "none":
            implementations.total_loss(*tensors, row_weight, 0.1, 0.1, 2.0, "triton", 7, True, True)
        else:
            tensors = (*tensors, 2.0, True, "triton", mode, 7)
            statistics = implementations.logit_statistics(*tensors)
            implementations.logit_statistics_backward(torch.zeros(3, 20), statistics, *tensors, True, True)
    assert len(launches) >= 5


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_tiles_cannot_be_read_from_are_copied(mode: str) -> None:
    hidden, weight, targets = on_device(*inputs(20, 8, 40, torch.float16))
    apart = torch.zeros(40 * 9 + 1, dtype=torch.float16, device=DEVICE)
    for strided in (apart[1:].view(40, 9)[:, :8], apart[1 : 40 * 8 + 1].view(40, 8), weight.T.contiguous().T):
        strided.copy_(weight)
        leaf = strided.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, leaf, targets, mode=mode, backend="triton"), leaf)
        expected = with_gradients(linear_cross_entropy, hidden, weight, targets, mode=mode, backend="triton")[2]
        assert torch.equal(gradient, expected)


def test_the_panel_of_the_gradient_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for rows in (1, 500, 8192, 100_000):
        for vocabulary in (100, 49_152, 151_936):
            columns = launch.panel_columns(rows, vocabulary, torch.bfloat16)
            assert columns % 512 == 0 and columns < vocabulary + 512
            assert columns == 512 or rows * columns * 2 <= launch.PANEL_BYTES
