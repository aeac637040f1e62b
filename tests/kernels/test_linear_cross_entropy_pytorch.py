"""What `linear_cross_entropy` costs, and how it gets on with the rest of PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from losses import IGNORED, MODES, inputs, plain_cross_entropy, with_gradients
from sbp_kernels import linear_cross_entropy
from sbp_kernels.linear_cross_entropy import LinearCrossEntropy, loss_rows_of, resolve_mode
from sbp_kernels.linear_cross_entropy import cpu as plain
from sbp_kernels.linear_cross_entropy import operations as implementations
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from trees import error

OPERATIONS = torch.ops.sbp_kernels
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def allocations(function: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of the largest allocation and of the most that lived at once, whoever made them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live, most, largest = 0, 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most, largest = max(most, live), max(largest, event.nbytes())
    return largest, most


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_full_logits_never_exist(mode: str, dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width, vocabulary, slab = 4096, 4, 1024, 128
    monkeypatch.setattr(plain, "TILE_ROWS", slab)
    monkeypatch.setattr(plain, "TILE_COLUMNS", vocabulary)
    hidden, weight, targets = inputs(rows, width, vocabulary, dtype)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def step(rows: int) -> None:
        loss = linear_cross_entropy(leaves[0][:rows], leaves[1], targets[:rows], mode=mode, slab_rows=slab, reduction=reduction)
        loss.sum().backward()

    step(rows)  # whatever the first call sets up
    largest, most = allocations(lambda: step(rows))
    of_slab = slab * vocabulary * 4
    assert largest <= of_slab
    assert most <= 4 * of_slab + 60 * rows * 8  # and what is proportional to the rows alone
    assert most < rows * vocabulary * dtype.itemsize / 2
    assert most - allocations(lambda: step(rows // 2))[1] < 60 * rows * 8


def test_the_measure_of_allocations_sees_full_logits() -> None:
    hidden, weight, targets = inputs(4096, 4, 1000, torch.float32)
    largest, most = allocations(lambda: plain_cross_entropy(hidden.requires_grad_(), weight, targets).backward())
    assert largest == 4096 * 1000 * 4 and most >= 2 * largest


def counted(function: Callable[[], Any], formulas: dict[Any, Callable[..., int]]) -> int:
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        function()
    return counter.get_total_flops()


def in_place_product(total: Any, a: Any, b: Any, **_: Any) -> int:
    """FLOPs of `addmm_`, which the counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def counted_inside(implementation: Callable[..., Any]) -> Callable[..., int]:
    """Formula of an operation that runs it once more and counts the products which it is made of."""

    def formula(*arguments: Any, out_val: Any = None) -> int:
        return counted(lambda: implementation(*arguments), {torch.ops.aten.addmm_: in_place_product})

    formula._get_raw = True  # type: ignore[attr-defined]  # the counter passes tensors, not shapes
    return formula


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_rows_without_loss_cost_no_operations(mode: str, reduction: str) -> None:
    hidden, weight, targets = inputs(40, 6, 9, torch.float32)
    targets[::3] = IGNORED
    product = 2 * int((targets != IGNORED).sum()) * 6 * 9
    inside = {
        OPERATIONS.linear_cross_entropy_total: counted_inside(implementations.total_loss),
        OPERATIONS.linear_cross_entropy_statistics: counted_inside(implementations.logit_statistics),
        OPERATIONS.linear_cross_entropy_statistics_backward: counted_inside(implementations.logit_statistics_backward),
        OPERATIONS.linear_cross_entropy_scaled: counted_inside(implementations.scaled),
    }
    for loss_rows in (None, loss_rows_of(targets, 39)):
        chosen = {"mode": mode, "loss_rows": loss_rows, "reduction": reduction}

        def step(chosen: dict[str, Any] = chosen) -> None:
            with_gradients(linear_cross_entropy, hidden, weight, targets, **chosen)

        expected = 3 * product if mode == "slab" and reduction == "sum" else 4 * product
        assert counted(step, inside) == expected
        assert counted(step, {}) == expected  # as the operations' own formulas tell the counter


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    hidden, weight, targets = inputs(12, 6, 9, torch.float32)
    product = 2 * (targets >= 0).sum().item() * 6 * 9
    with torch.no_grad():
        assert counted(lambda: linear_cross_entropy(hidden, weight.requires_grad_(), targets), {}) == product
    for mode, extra in (("slab", 1), ("recompute", 2)):
        for leaves in ((hidden, weight.detach()), (hidden.detach(), weight)):
            for leaf in leaves:
                leaf.grad = None
            hidden.requires_grad_()
            step = lambda leaves=leaves, mode=mode: linear_cross_entropy(*leaves, targets, mode=mode).backward()  # noqa: E731
            assert counted(step, {}) == product * (1 + extra)
            assert [leaf.grad is not None for leaf in leaves] == [leaf.requires_grad for leaf in leaves]


def test_autocast_multiplies_in_its_dtype() -> None:
    hidden, weight, targets = inputs(12, 6, 9, torch.float32)
    for mode in MODES:
        with torch.autocast("cpu", torch.bfloat16):
            loss, *gradients = with_gradients(linear_cross_entropy, hidden, weight, targets, mode=mode)
        rounded = with_gradients(linear_cross_entropy, hidden.bfloat16(), weight.bfloat16(), targets, mode=mode)
        assert loss == rounded[0] and all(gradient.dtype == torch.float32 for gradient in gradients)
        assert torch.equal(gradients[1], rounded[2].float())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", pytest.param("mean", marks=pytest.mark.slow), "none"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break_and_for_any_number_of_rows(compiler: str, reduction: str, mode: str) -> None:
    torch._dynamo.reset()
    chosen: dict[str, Any] = {"mode": mode, "reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}
    chosen["normalizer"] = None if reduction == "mean" else torch.tensor(3.0)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(linear_cross_entropy, backend=counter, fullgraph=True, dynamic=True)
    compilations = set()
    for rows in (17, 33, 40):
        tensors = inputs(rows, 6, 9, torch.float32)
        chosen["loss_rows"] = loss_rows_of(tensors[2], rows + 2) if mode == "slab" else None
        found = with_gradients(compiled, *tensors, **chosen)
        expected = with_gradients(linear_cross_entropy, *tensors, **chosen)
        for mine, right in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, right)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operations_keep_what_they_promise_to_pytorch(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(12, 8, 9, dtype)
    rows, count = torch.cat([loss_rows_of(targets, 12)]), (targets >= 0).sum().int()
    row_targets = F.pad(targets, (0, 1), value=-1)[rows].where(rows < 12, -1).int()
    tensors = (hidden.requires_grad_(), weight.requires_grad_(), row_targets, rows, count)
    weights = torch.rand(12)
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            OPERATIONS.linear_cross_entropy_total.default, (*tensors, weights, 0.1, 0.1, 2.0, "torch", 5, *wanted),
            test_utils=CHECKS if all(wanted) else "test_faketensor",
        )  # fmt: skip
    for mode in MODES:
        how = (2.0, True, "torch", mode, 5)
        torch.library.opcheck(OPERATIONS.linear_cross_entropy_statistics.default, (*tensors, *how))
        with torch.no_grad():
            statistics = OPERATIONS.linear_cross_entropy_statistics(*tensors, *how)
            plain = [tensor.detach() for tensor in tensors]
            torch.library.opcheck(
                OPERATIONS.linear_cross_entropy_statistics_backward.default,
                (torch.rand(3, 12), statistics, *plain, *how, True, True),
            )
    torch.library.opcheck(OPERATIONS.linear_cross_entropy_scaled.default, (torch.rand(3, 4), torch.rand(1), dtype))


def test_checkpointed_activations_give_the_same_gradients() -> None:
    hidden, weight, targets = inputs(12, 6, 9, torch.float64)
    for mode in MODES:

        def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor, mode: str = mode) -> Tensor:
            return checkpoint(linear_cross_entropy, hidden, weight, targets, mode=mode, use_reentrant=False)

        found = with_gradients(checkpointed, hidden, weight, targets)
        expected = with_gradients(linear_cross_entropy, hidden, weight, targets, mode=mode)
        assert all(torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, targets = inputs(12, 6, 9, torch.float64)
    for mode in MODES:
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets, mode=mode).square()
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, mode=mode).square(), hidden)[0]
        assert torch.equal(gradient, expected)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            gradient.sum().backward()


def test_inputs_need_not_be_contiguous_and_are_left_alone() -> None:
    hidden, weight, targets = inputs(12, 6, 9, torch.float64)
    for mode in MODES:
        expected = with_gradients(linear_cross_entropy, hidden, weight, targets, mode=mode)
        strided = hidden.T.contiguous().T.requires_grad_(), weight.repeat(1, 2)[:, :6].requires_grad_()
        before = [x.detach().clone() for x in strided]
        loss = linear_cross_entropy(*strided, targets, mode=mode)
        found = [loss, *torch.autograd.grad(loss, strided)]
        assert all(error(mine, right) < 1e-14 for mine, right in zip(found, expected, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(strided, before, strict=True))


def test_the_module_holds_the_weight_and_the_options() -> None:
    hidden, _, targets = inputs(12, 6, 9, torch.float32)
    torch.manual_seed(0)
    head = LinearCrossEntropy(6, 9, softcap=2.0, reduction="mean")
    assert head.weight.abs().max() <= 6**-0.5 and head.weight.std() > 0.1
    expected = linear_cross_entropy(hidden, head.weight, targets, softcap=2.0, reduction="none")
    assert torch.equal(head(hidden, targets, reduction="none"), expected)
    embedding = nn.Embedding(9, 6)
    tied = LinearCrossEntropy(6, 9, weight=embedding.weight)
    tied(hidden, targets).backward()
    assert tied.weight is embedding.weight and embedding.weight.grad is not None
    with pytest.raises(ValueError, match=r"weight is \(9, 6\), not \[vocabulary, width\] = \(9, 7\)"):
        LinearCrossEntropy(7, 9, weight=embedding.weight)


def test_the_mode_is_chosen_by_size() -> None:
    assert resolve_mode(131_072, 4096, torch.bfloat16) == "slab"
    assert resolve_mode(262_144, 8192, torch.bfloat16) == "recompute"
    assert resolve_mode(262_144, 8193, torch.bfloat16) == "slab"  # rows of no multiple of 16 bytes
    assert resolve_mode(9, 6, torch.float32, mode="recompute") == "recompute"
    with pytest.raises(ValueError, match="mode 'full' is unknown: use one of auto, slab, recompute"):
        resolve_mode(9, 6, torch.float32, mode="full")


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hidden, weight, targets = inputs(4, 6, 9, torch.float32)
    for arguments, message in [
        ((hidden, weight[:, :5], targets), "do not fit"),
        ((hidden, weight, targets[:3]), "do not fit"),
        ((hidden, weight, targets.int()), "targets int64"),
        ((hidden, weight.double(), targets), "convert one of them, or use autocast"),
        ((hidden, weight, targets.to("meta")), "all tensors must be on one device, not on cpu and meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments)
    for options, message in [
        ({"slab_rows": 0}, "slab_rows must be at least 1"),
        ({"mode": "full"}, "mode 'full' is unknown"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown"),
        ({"reduction": "batch"}, "reduction 'batch' is unknown"),
        ({"reduction": "mean", "normalizer": 2}, "normalizer goes with"),
        ({"normalizer": torch.ones(2)}, "normalizer must be a scalar"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in 0..1"),
        ({"loss_rows": torch.ones(2)}, "loss_rows must be int32"),
        ({"row_weight": torch.ones(2)}, "row_weight must be"),
        ({"backend": "triton", "mode": "recompute"}, "multiple of 16 bytes, not H = 6: use 'slab'"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(hidden, weight, targets, **options)
    with pytest.raises(ValueError, match="no float64"):
        linear_cross_entropy(hidden.double(), weight.double(), targets, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="'triton' needs CUDA tensors, not cpu"):
        linear_cross_entropy(hidden, weight, targets, backend="triton")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", [9, -1, 10**12])
def test_targets_outside_the_vocabulary_are_refused(target: int, mode: str) -> None:
    hidden, weight, targets = inputs(4, 6, 9, torch.float32)
    targets[1] = target
    with pytest.raises(ValueError, match="targets must lie within the vocabulary"):
        linear_cross_entropy(hidden, weight, targets, mode=mode)
