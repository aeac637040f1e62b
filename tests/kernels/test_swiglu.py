from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sbp_kernels.swiglu import SwiGLU, reference, swiglu, swiglu_linear
from sbp_kernels.swiglu import triton as swiglu_kernels
from small_ops import INTERPRETED, check_errors, guarded_memory, strided, with_gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def small_blocks() -> Iterator[None]:
    with mock.patch.multiple(swiglu_kernels, TILE=128, WIDEST_BLOCK=32), guarded_memory():
        yield


def inputs(
    shape: tuple[int, ...], width: int, dtype: torch.dtype, device: str = "cpu", spread: float = 1.0, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """gate_up [*shape, 2 width] and down_weight [24, width]; gradients of the product and of what it is projected to."""
    generator = torch.Generator().manual_seed(width + 1000 * seed)
    gate_up = torch.randn(*shape, 2 * width, generator=generator) * spread
    down_weight = torch.randn(24, width, generator=generator) * width**-0.5
    upstream = [torch.randn(*shape, size, generator=generator) for size in (width, 24)]
    return [x.to(device, dtype) for x in (gate_up, down_weight)], [x.to(device, dtype) for x in upstream]


def run(backend: str, leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """The product and the gradient of gate_up, then the projection and both gradients."""
    one = with_gradients(lambda gate_up: swiglu(gate_up, backend=backend), leaves[:1], upstream[:1])
    return one + with_gradients(lambda *x: swiglu_linear(*x, backend=backend), leaves, upstream[1:])


def exactly(leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    wide = [x.double() for x in leaves]
    return with_gradients(reference.swiglu, wide[:1], upstream[:1]) + with_gradients(
        reference.swiglu_linear, wide, upstream[1:]
    )


@settings(max_examples=30)
@given(st.integers(0, 9), st.integers(130, 260), st.sampled_from(INTERPRETED), st.booleans(), st.floats(0.1, 8))
@example(1, 131, torch.float32, True, 1.0)
def test_errs_no_more_than_twice_the_plain_operation(
    rows: int, width: int, dtype: torch.dtype, slices: bool, spread: float
) -> None:
    kinds: list[list[list[Tensor]]] = [[], [], []]
    for seed in range(1 + 1200 // (max(rows, 1) * width)):  # a row alone is judged by luck
        leaves, upstream = inputs((rows,), width, dtype, spread=spread, seed=seed)
        used = (leaves, upstream)
        if slices and rows:
            used = [strided(leaves[0]), leaves[1]], [strided(upstream[0]), upstream[1]]
        with small_blocks():
            kinds[0].append(run("triton", *used))
        kinds[1].append(run("torch", leaves, upstream))
        kinds[2].append(exactly(leaves, upstream))
    check_errors(*([torch.stack(draws) for draws in zip(*kind, strict=True)] for kind in kinds))


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (2, 3, 5), ()])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    leaves, upstream = inputs(shape, 5, torch.float32)
    with small_blocks():
        found = run("triton", leaves, upstream)
    check_errors(found, run("torch", leaves, upstream), exactly(leaves, upstream))


@pytest.mark.parametrize("dtype", INTERPRETED)
def test_extreme_gates_do_not_overflow(dtype: torch.dtype) -> None:
    gates = torch.tensor([-1e4, -200.0, -100.0, -88.0, -20.0, -1.0, 0.0, 1.0, 20.0, 88.0, 100.0, 200.0, 1e4])
    gate_up = torch.cat([gates.expand(3, -1), torch.tensor([[6.0], [-6.0], [0.0]]).expand(-1, len(gates))], 1).to(dtype)
    upstream = [torch.ones(3, len(gates))]
    with small_blocks():
        found = with_gradients(lambda x: swiglu(x, backend="triton"), [gate_up], upstream)
    exact = with_gradients(reference.swiglu, [gate_up.double()], upstream)
    for mine, right in zip(found, exact, strict=True):  # element by element, small ones too
        torch.testing.assert_close(mine, right.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


def test_every_run_gives_the_same_bits() -> None:
    leaves, upstream = inputs((50,), 72, torch.float32)
    with small_blocks():
        assert all(map(torch.equal, run("triton", leaves, upstream), run("triton", leaves, upstream)))


def test_the_product_is_never_saved() -> None:
    (gate_up, weight), (_, gradient) = inputs((6,), 48, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        out = swiglu_linear(gate_up.requires_grad_(), weight.requires_grad_(), backend="triton")
    assert {x.untyped_storage().data_ptr() for x in saved} == {x.untyped_storage().data_ptr() for x in (gate_up, weight)}
    out.backward(gradient)


def test_a_frozen_projection_costs_no_product() -> None:
    (gate_up, weight), (_, gradient) = inputs((6,), 48, torch.float32)
    right = with_gradients(lambda x: F.linear(swiglu(x, backend="torch"), weight), [gate_up], [gradient])
    with FlopCounterMode(display=False) as counter, guarded_memory():
        found = with_gradients(lambda x: swiglu_linear(x, weight, backend="triton"), [gate_up], [gradient])
    torch.testing.assert_close(found, right)
    assert counter.get_total_flops() == 2 * (2 * 6 * 48 * 24)


def test_autocast_multiplies_in_its_dtype() -> None:
    leaves, upstream = inputs((6,), 48, torch.float32)
    rounded = [x.half() for x in leaves]
    for backend in ("torch", "triton"):
        with torch.autocast("cpu", torch.float16):
            found = with_gradients(lambda *x, b=backend: swiglu_linear(*x, backend=b), leaves, upstream[1:])
        right = with_gradients(lambda *x, b=backend: swiglu_linear(*x, backend=b), rounded, upstream[1:])
        assert torch.equal(found[0], right[0]) and found[0].dtype == torch.float16
        assert all(torch.equal(mine, theirs.float()) for mine, theirs in zip(found[1:], right[1:], strict=True))


class FeedForward(nn.Module):
    """What the module stands in for."""

    def __init__(self, width: int, feed_forward_width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * feed_forward_width, bias=False)
        self.down_proj = nn.Linear(feed_forward_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


@pytest.mark.parametrize("triton", [False, True])
def test_the_module_stands_in_for_the_models(triton: bool) -> None:
    theirs, mine = FeedForward(24, 40), SwiGLU(24, 40)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    with mock.patch.object(import_module("sbp_kernels.swiglu.api"), "runs_triton", return_value=triton):
        found = with_gradients(mine, [x], [x])
        mine(x).sum().backward()
    theirs(x).sum().backward()
    torch.testing.assert_close(found, with_gradients(theirs, [x], [x]))
    for parameter, right in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, right.grad)


def test_opcheck() -> None:
    (gate_up, _), (gradient, _) = inputs((2, 3), 40, torch.float32)
    operations = torch.ops.sbp_kernels
    torch.library.opcheck(operations.swiglu, (gate_up.clone().requires_grad_(),))
    torch.library.opcheck(operations.swiglu, (strided(gate_up).requires_grad_(),))
    torch.library.opcheck(operations.swiglu_backward, (gradient, strided(gate_up), False))
    torch.library.opcheck(operations.swiglu_backward, (strided(gradient), gate_up, True))


def test_compiles_whole_and_twice_at_most() -> None:
    torch.compiler.reset()  # it would remember which sizes change
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *x: (swiglu(x[0], backend="triton"), swiglu_linear(*x, backend="triton")), fullgraph=True, backend=counter
    )
    for rows in (5, 9, 13, 30, 17):
        leaves, upstream = inputs((rows,), 40, torch.float32)
        outputs = compiled(*(leaf.requires_grad_() for leaf in leaves))
        right = run("triton", leaves, upstream)
        assert torch.equal(outputs[0], right[0]) and torch.equal(outputs[1], right[2])
        torch.testing.assert_close(torch.autograd.grad(outputs[1], leaves, upstream[1]), tuple(right[3:]))
    assert counter.frame_count == 2  # one more where the number of rows first changes


def test_activation_checkpointing() -> None:
    leaves, upstream = inputs((5,), 40, torch.float32)
    found = with_gradients(
        lambda *x: checkpoint(lambda *t: swiglu_linear(*t, backend="triton"), *x, use_reentrant=False), leaves, upstream[1:]
    )
    assert all(map(torch.equal, found, run("triton", leaves, upstream)[2:]))


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, weight = torch.ones(3, 8), torch.ones(5, 4)
    for arguments, message in [
        ((gate_up, weight[:, :3]), r"down_weight must be \[W, F\]"),
        ((gate_up, weight[0]), r"down_weight must be \[W, F\]"),
        ((gate_up, weight.double()), "down_weight, torch.float64 on cpu, must share dtype and device"),
    ]:
        with pytest.raises(ValueError, match=message):
            swiglu_linear(*arguments)
    with pytest.raises(ValueError, match="its last dimension is 7"):
        swiglu(gate_up[:, :7])
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        swiglu(gate_up, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' needs CUDA tensors"):
        swiglu(gate_up, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 3072), (1000, 64), (515, 8064), (130, 14336)])
def test_on_a_gpu(rows: int, width: int, dtype: torch.dtype) -> None:
    leaves, upstream = inputs((rows,), width, dtype, "cuda")
    with guarded_memory():
        found, again = run("auto", leaves, upstream), run("triton", leaves, upstream)
    assert all(map(torch.equal, found, again))
    check_errors(found, run("torch", leaves, upstream), exactly(leaves, upstream))
