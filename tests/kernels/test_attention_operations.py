"""Attention as operations of PyTorch: what `torch.compile`, tracing, checkpointing and CUDA graphs need of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sbp_kernels import PackedLayout, packed_attention
from sbp_kernels.attention import fused, launch
from sbp_kernels.attention import triton as kernels
from sbp_kernels.layout import plan
from sbp_kernels.layout.device_plan import plan_documents
from sbp_kernels.layout.plan import Tiles
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

SMALL = Tiles(16, 16, 16, 16)
TOKENS, WIDTH = 40, 16
FORESTS = [([20, 9, 11], [-1, 0, 0]), ([3] * 10 + [10], [-1, *range(10)]), ([40], [-1]), ([9, 31], [-1, -1])]
BACKENDS = ["torch", "triton", "triton-hopper"]


@pytest.fixture(autouse=True)
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAXIMUM_PARTS", 4)
    monkeypatch.setattr(plan, "SLOTS", 8)


def layouts() -> list[PackedLayout]:
    return [PackedLayout.from_tree(*forest, tiles=SMALL).planned() for forest in FORESTS]


def qkv(requires_grad: bool = True, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, heads, WIDTH) for heads in (2, 1, 1)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def operations(layout: PackedLayout) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    rest = fused._arguments(layout, 0.25)
    return {
        "torch": (torch.ops.sbp_kernels.segment_attention, (layout.visible_until, 0.25)),
        "triton": (torch.ops.sbp_kernels.packed_attention, rest),
        "triton-hopper": (torch.ops.sbp_kernels.specialised_attention, rest),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    operation, rest = operations(layouts()[0])[backend]
    torch.library.opcheck(operation.default, (*qkv(), *rest))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_backward(backend: str) -> None:
    operation, rest = operations(layouts()[0])[backend]
    inputs = qkv(requires_grad=False)
    out, lse = operation(*inputs, *rest)
    backward = getattr(torch.ops.sbp_kernels, f"{operation._qualified_op_name.partition('::')[2]}_backward").default
    for dlse in (None, torch.ones_like(lse)):
        torch.library.opcheck(backward, (torch.ones_like(out), dlse, *inputs, out, lse, *rest))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_and_once_for_all_lengths(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def loss(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        return packed_attention(q * 2, k, v, layout, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    leaves = qkv()
    for layout in layouts():
        value, expected = compiled(*leaves, layout), loss(*leaves, layout)
        assert torch.equal(value, expected)
        gradients = zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True)
        assert all(torch.equal(mine, right) for mine, right in gradients)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_traces_with_fake_tensors(backend: str) -> None:
    operation, rest = operations(layouts()[0])[backend]
    real = operation(*qkv(), *rest)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaves = [mode.from_tensor(x) for x in qkv()]
        fake = operation(*leaves, *rest)
        gradients = torch.autograd.grad(fake[0].sum(), leaves)
    for mine, right in zip((*fake, *gradients), (*real, *qkv()), strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (right.shape, right.dtype, right.stride())


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend: str) -> None:
    layout = layouts()[0]
    projection = nn.Linear(WIDTH, WIDTH, bias=False)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return projection(packed_attention(projection(q), projection(k), v, layout, backend=backend))

    leaves = [*qkv(), projection.weight]
    whole = torch.autograd.grad(block(*leaves[:3]).square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(block, *leaves[:3], use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(mine, right) for mine, right in zip(again, whole, strict=True))


class NothingReadsTheDevice(TorchDispatchMode):
    """Fails where an operation would have to wait for a device to know what to do next."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        name = function._schema.name.partition("::")[2]
        moves = name == "_to_copy" and (options or {}).get("device") is not None
        assert name not in self.WAITING and not moves, f"{name} waits for the device"
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("backend", ["triton", "triton-hopper"])
def test_no_host_device_synchronisation(backend: str) -> None:
    layout, leaves = layouts()[0], qkv()
    with NothingReadsTheDevice():
        out = packed_attention(*leaves, layout, backend=backend)
        torch.autograd.grad(out, leaves, torch.ones(out.shape))
    ends = torch.tensor([0, 9, 9, 40], dtype=torch.int32)
    with NothingReadsTheDevice():
        plan_documents(ends, TOKENS, SMALL)


class Recorder:
    """Stands for a kernel and notes what Triton would compile for: constants, types and what it specialises on."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, **constants: Any) -> None:
            kinds = [
                (x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor)
                else (type(x), x == 1, x % 16 == 0) if isinstance(x, int) else type(x)
                for x in arguments
            ]  # fmt: skip
            self.launches.append((self.kernel.__name__, grid, tuple(kinds), tuple(sorted(constants.items()))))
            self.kernel[grid](*arguments, **constants)

        return run


def test_lengths_change_neither_a_kernels_compilation_nor_its_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing is recompiled, and a CUDA graph of one batch serves the next."""
    launches: list[Any] = []
    for name in ("forward_kernel", "dq_kernel", "dk_dv_kernel", "combine_kernel"):
        monkeypatch.setattr(launch.kernels, name, Recorder(getattr(kernels, name), launches))
    seen = set()
    for layout in layouts():
        leaves = qkv()
        torch.autograd.grad(packed_attention(*leaves, layout, backend="triton").sum(), leaves)
        seen.add(tuple(launches))
        launches.clear()
    assert len(seen) == 1 and len(seen.pop()) == 4


@pytest.mark.gpu
def test_on_a_gpu_no_synchronisation_and_one_graph_for_other_lengths() -> None:
    shapes = [(4096, heads, 64) for heads in (8, 2, 2)]
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    lengths = [[1000, 3000, 96], [4096], [500, 1500, 2096]]
    moved = [PackedLayout.from_lengths(x, tiles=plan.WIDE).to("cuda") for x in lengths]
    right = [packed_attention(q, k, v, layout) for layout in moved]  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_attention(q, k, v, PackedLayout.from_lengths(lengths[0], tiles=plan.WIDE).to("cuda"))
        ends = torch.tensor([0, 1000, 4000, 4096], dtype=torch.int32, pin_memory=True).to("cuda", non_blocking=True)
        packed_attention(q, k, v, PackedLayout.from_cu_seqlens(ends, tokens=4096))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static = PackedLayout.from_lengths(lengths[0], tiles=plan.WIDE).to("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed_attention(q, k, v, static)
    for layout, expected in zip(moved, right, strict=True):
        assert static.plan is not None and layout.plan is not None
        pairs = zip((static.visible_until, *static.plan.tables), (layout.visible_until, *layout.plan.tables), strict=True)
        for mine, theirs in pairs:
            mine.copy_(theirs)
        graph.replay()
        assert torch.equal(out, expected)
