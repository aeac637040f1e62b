from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sbp_kernels.norm import RMSNorm, reference, rms_norm
from sbp_kernels.norm import api as norm
from sbp_kernels.norm import triton as norm_kernels
from small_ops import INTERPRETED, check_errors, guarded_memory, strided, with_gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint


@contextmanager
def small_blocks(tile: int = 128, widest_row: int = 16384) -> Iterator[None]:
    """Blocks so small that a few rows take several programs, and rows above `widest_row` several blocks."""
    sizes = {"TILE": tile, "WIDEST_FORWARD_ROW": widest_row, "WIDEST_BACKWARD_ROW": widest_row}
    with mock.patch.multiple(norm_kernels, **sizes), guarded_memory():
        yield


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, residual: bool, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """x, weight and perhaps a residual; gradients of y and perhaps of the sum."""
    generator = torch.Generator().manual_seed(shape[-1])
    x, other, *upstream = (torch.randn(shape, generator=generator) for _ in range(4))
    weight = 1 + 0.3 * torch.randn(shape[-1:], generator=generator)
    leaves = [x.to(device, dtype), weight.to(device, dtype), *([other.to(device, dtype)] if residual else [])]
    return leaves, [g.to(device, dtype) for g in upstream[: 1 + residual]]


def run(backend: str, leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    return with_gradients(lambda x, w, r=None: rms_norm(x, w, residual=r, backend=backend), leaves, upstream)


def exactly(leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    wide = [x.double() for x in leaves]
    return with_gradients(lambda x, w, r=None: reference.rms_norm(x, w, r)[: len(upstream)], wide, upstream)


@settings(max_examples=40)
@given(
    st.sampled_from([0, *range(4, 11)]),
    st.integers(130, 400),
    st.sampled_from(INTERPRETED),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@example(4, 131, torch.float32, True, False, False)
@example(5, 257, torch.float16, True, True, True)
def test_errs_no_more_than_twice_the_plain_operation(
    rows: int, width: int, dtype: torch.dtype, residual: bool, slices: bool, several_blocks: bool
) -> None:
    leaves, upstream = inputs((rows, width), dtype, residual)
    used = [strided(x) for x in (leaves if rows else [])], [strided(x) for x in upstream]
    with small_blocks(tile=64 if several_blocks else 128, widest_row=32 if several_blocks else 512):
        found = run("triton", *(used if slices and rows else (leaves, upstream)))
    check_errors(found, run("torch", leaves, upstream), exactly(leaves, upstream))


@pytest.mark.parametrize("residual", [False, True])
def test_one_row(residual: bool) -> None:
    """Each row alone. All of its numbers share the rounding of one statistic, so that errors of many rows are judged."""
    leaves, upstream = inputs((16, 131), torch.float32, residual)
    results = []
    for function in (lambda *x: run("triton", *x), lambda *x: run("torch", *x), exactly):
        rows = [
            function(
                [leaf if leaf.dim() == 1 else leaf[row : row + 1] for leaf in leaves], [g[row : row + 1] for g in upstream]
            )
            for row in range(16)
        ]
        results.append([torch.stack(kind) for kind in zip(*rows, strict=True)])
    check_errors(*results)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 0, 8), (2, 3, 5, 40), (40,)])
@pytest.mark.parametrize("residual", [False, True])
def test_any_leading_dimensions(shape: tuple[int, ...], residual: bool) -> None:
    leaves, upstream = inputs(shape, torch.float32, residual)
    with small_blocks():
        found = run("triton", leaves, upstream)
    check_errors(found, run("torch", leaves, upstream), exactly(leaves, upstream))


@pytest.mark.parametrize(("shape", "swapped"), [((6, 5, 48), (0, 1)), ((6, 5, 48), (0, 2)), ((6, 48), (0, 1))])
def test_the_order_of_dimensions_in_memory_does_not_matter(shape: tuple[int, ...], swapped: tuple[int, int]) -> None:
    (x, weight, residual), upstream = inputs(shape, torch.float32, True)
    right = run("triton", [x, weight, residual], upstream)
    x, residual, *upstream = (t.transpose(*swapped).contiguous().transpose(*swapped) for t in (x, residual, *upstream))
    assert not x.is_contiguous()
    assert all(map(torch.equal, run("triton", [x, weight, residual], upstream), right))


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e4])
@pytest.mark.parametrize("widest_row", [32, 16384])
def test_rows_of_zeros_and_extreme_rows(scale: float, widest_row: int) -> None:
    (x, weight), upstream = inputs((6, 72), torch.float32, False)
    x[::2] *= scale
    with small_blocks(widest_row=widest_row):
        found = run("triton", [x, weight], upstream)
    assert all(result.isfinite().all() for result in found)
    check_errors(found, run("torch", [x, weight], upstream), exactly([x, weight], upstream))


def test_every_run_gives_the_same_bits() -> None:
    leaves, upstream = inputs((50, 96), torch.float32, True)
    with small_blocks():
        first, second = run("triton", leaves, upstream), run("triton", leaves, upstream)
    assert all(map(torch.equal, first, second))


def test_a_program_walks_through_many_blocks_of_rows() -> None:
    leaves, upstream = inputs((50, 96), torch.float32, True)
    with small_blocks(), mock.patch.object(norm_kernels, "backward_programs", return_value=3):
        found = run("triton", leaves, upstream)
    check_errors(found, run("torch", leaves, upstream), exactly(leaves, upstream))


def test_one_rounding_errs_less_than_two() -> None:
    (x, weight), _ = inputs((64, 256), torch.float16, False)
    exact = reference.rms_norm(x, weight)[0]
    ours = rms_norm(x, weight, backend="triton")
    wide = x.float()
    llama = weight * (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).half()
    assert (ours.double() - exact).square().mean() < 0.7 * (llama.double() - exact).square().mean()


def test_a_float32_weight_beside_a_lower_dtype() -> None:
    (x, _), upstream = inputs((8, 64), torch.float16, False)
    weight = inputs((8, 64), torch.float32, False)[0][1]
    found = run("triton", [x, weight], upstream)
    assert [result.dtype for result in found] == [torch.float16, torch.float16, torch.float32]
    check_errors(found, run("torch", [x, weight], upstream), exactly([x, weight], upstream))


def test_outputs_that_nobody_uses() -> None:
    (x, weight, residual), (y_gradient, sum_gradient) = inputs((5, 48), torch.float32, True)
    for used, gradient in ((0, y_gradient), (1, sum_gradient)):
        results = []
        for backend, dtype in (("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
            leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in (x, weight, residual)]
            outputs = rms_norm(leaves[0], leaves[1], residual=leaves[2], backend=backend)
            results.append(torch.autograd.grad(outputs[used], leaves, gradient.to(dtype), allow_unused=True))
        assert len({tuple(gradient is None for gradient in found) for found in results}) == 1
        check_errors(*([gradient for gradient in found if gradient is not None] for found in results))


@pytest.mark.parametrize("triton", [False, True])
def test_the_module_stands_in_for_torchs(triton: bool) -> None:
    (x, weight, residual), upstream = inputs((7, 48), torch.float32, True)
    theirs, mine = nn.RMSNorm(48, 1e-5), RMSNorm(48, 1e-5)
    with torch.no_grad():
        theirs.weight.copy_(weight)
    mine.load_state_dict(theirs.state_dict())
    assert repr(mine) == repr(theirs)
    with mock.patch.object(norm, "runs_triton", return_value=triton):
        one = with_gradients(lambda x, *_: mine(x), [x], upstream[:1])
        two = with_gradients(mine, [x, residual], upstream)
        mine(x).backward(upstream[0])
    theirs(x).backward(upstream[0])
    torch.testing.assert_close(one, with_gradients(lambda x, *_: theirs(x), [x], upstream[:1]))
    torch.testing.assert_close(two, with_gradients(lambda x, r: (theirs(x + r), x + r), [x, residual], upstream))
    torch.testing.assert_close(mine.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(RMSNorm(48)(x), nn.RMSNorm(48)(x))  # the default epsilon is that of the dtype


def test_opcheck() -> None:
    (x, weight, residual), (gradient, sum_gradient) = inputs((2, 3, 40), torch.float32, True)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, residual)]
    operations = torch.ops.sbp_kernels
    torch.library.opcheck(operations.rms_norm, (x, weight, 1e-6))
    torch.library.opcheck(operations.rms_norm, (strided(x.detach()), weight, 1e-6))
    torch.library.opcheck(operations.rms_norm, (x.detach().half().transpose(0, 1), weight, 1e-6))
    torch.library.opcheck(operations.add_rms_norm, (leaves[0], leaves[2], weight, 1e-6))
    saved = (x.detach(), weight.detach(), torch.ones(2, 3))
    torch.library.opcheck(operations.rms_norm_backward, (gradient, sum_gradient, *saved))
    torch.library.opcheck(operations.rms_norm_backward, (strided(gradient), None, *saved))


def test_compiles_whole_and_twice_at_most() -> None:
    torch.compiler.reset()  # it would remember which sizes change
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, w, r: rms_norm(x, w, residual=r, backend="triton"), fullgraph=True, backend=counter)
    for rows in (5, 9, 13, 30, 17):
        leaves, upstream = inputs((rows, 48), torch.float32, True)
        found = with_gradients(compiled, leaves, upstream)
        assert all(map(torch.equal, found, run("triton", leaves, upstream)))
    assert counter.frame_count == 2  # one more where the number of rows first changes


def test_auto_is_triton_for_cuda_tensors_outside_of_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = mock.Mock(is_cuda=True, dtype=torch.bfloat16)
    assert norm.runs_triton("auto", tensor) and norm.runs_triton("triton", tensor)
    assert not norm.runs_triton("torch", tensor) and not norm.runs_triton("auto", torch.ones(1))
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert norm.runs_triton("triton", tensor) and not norm.runs_triton("auto", tensor)


def test_activation_checkpointing() -> None:
    leaves, upstream = inputs((5, 48), torch.float32, True)

    def operation(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(
            lambda *t: rms_norm(t[0], t[1], residual=t[2], backend="triton"), x, weight, residual, use_reentrant=False
        )

    assert all(map(torch.equal, with_gradients(operation, leaves, upstream), run("triton", leaves, upstream)))


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(3, 8), torch.ones(8)
    for arguments, options, message in [
        ((x, weight[:7]), {}, r"weight must be \[W\]"),
        ((x, weight.to("meta")), {}, r"weight must be \[W\].*meta"),
        ((x, weight), {"residual": x[:2]}, "residual must be like x"),
        ((x, weight), {"residual": x.double()}, "residual must be like x: cast it"),
        ((x, weight), {"backend": "cuda"}, "backend 'cuda' is unknown: use one of auto, torch, triton"),
        ((x.double(), weight), {"backend": "triton"}, "cast torch.float64, or use backend='torch'"),
    ]:
        with pytest.raises(ValueError, match=message):
            rms_norm(*arguments, **options)
    with pytest.raises(ValueError, match="RMSNorm needs a weight over one dimension"):
        RMSNorm(8, elementwise_affine=False)(x)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' needs CUDA tensors"):
        rms_norm(x, weight, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 4096), (1000, 64), (513, 2048), (515, 3072), (130, 8064), (66, 16384), (33, 20480)]
)
@pytest.mark.parametrize("residual", [False, True])
def test_on_a_gpu(rows: int, width: int, dtype: torch.dtype, residual: bool) -> None:
    leaves, upstream = inputs((rows, width), dtype, residual, "cuda")
    with guarded_memory():
        found, again = run("auto", leaves, upstream), run("triton", leaves, upstream)
    assert all(map(torch.equal, found, again))
    check_errors(found, run("torch", leaves, upstream), exactly(leaves, upstream))
