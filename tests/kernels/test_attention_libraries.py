"""Third-party attention of varlen libraries, which plain torch stands in for, as if on a GPU."""

import inspect
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sbp_kernels import PackedLayout
from sbp_kernels.attention import third_party
from sbp_kernels.attention.registry import find_backend
from third_party_attention import (
    DOCUMENTS_ALONE,
    LAYOUTS,
    SCALE,
    SHARED_SEED,
    assert_accurate,
    exact,
    inputs,
    install,
    on_the_device_alone,
    run,
    torch_operation,
    with_gradients,
)
from torch import Tensor
from torch.nn.attention import varlen


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the backends take CPU tensors as if they were on a GPU of that generation."""
    find = third_party.find_library.__wrapped__

    def pretend(generation: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
        monkeypatch.setattr(third_party, "find_library", lambda backend, device: find(backend, torch.device("cuda")))

    pretend(8)
    return pretend


def document_by_document(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float) -> Tensor:
    """What kernels for documents compute, on [T, heads, D] in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    parts = [
        F.scaled_dot_product_attention(q[:, a:b], k[:, a:b], v[:, a:b], is_causal=True, scale=scale, enable_gqa=True)
        for a, b in pairwise(ends.tolist())
        if a < b
    ]
    return torch.cat(parts, 1).transpose(0, 1)


def assert_fit(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: object, longest_k: object) -> None:
    assert ends_q is ends_k and ends_q.dtype == torch.int32 and ends_q[0] == 0 and ends_q[-1] == len(q) == len(k) == len(v)
    assert longest_q == longest_k and type(longest_q) is int and longest_q in (int(ends_q.diff().max()), len(q))


def install_varlen(monkeypatch: pytest.MonkeyPatch, shares_heads_when_told: bool) -> None:
    real = inspect.signature(varlen.varlen_attn)

    def newer(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float, window_size: Any, enable_gqa: bool = False) -> Tensor:
        assert enable_gqa
        return older(q, k, v, *rest, scale=scale, window_size=window_size)

    def older(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float, window_size: Any) -> Tensor:
        real.bind(q, k, v, *rest, scale=scale, window_size=window_size)
        assert_fit(q, k, v, *rest)
        assert window_size == (-1, 0)  # causal
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        return document_by_document(q, k, v, rest[0], scale).to(q.dtype)

    monkeypatch.setattr(varlen, "varlen_attn", newer if shares_heads_when_told else older)


def install_flash_attn(monkeypatch: pytest.MonkeyPatch, module: str, returns_lse: bool) -> None:
    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        softmax_scale: float | None = None, causal: bool = False, deterministic: bool = False,
    ) -> Any:  # fmt: skip
        assert_fit(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert causal and softmax_scale is not None
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        out = document_by_document(q, k, v, cu_seqlens_q, softmax_scale).to(q.dtype)
        return (out, None) if returns_lse else out

    install(monkeypatch, module, flash_attn_varlen_func=flash_attn_varlen_func)


def install_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    class BlockDiagonalCausalMask:
        @classmethod
        def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: None = None, *, device: torch.device) -> Any:
            assert device == torch.device("cpu") and all(type(length) is int for length in q_seqlen)
            mask = cls()
            mask.ends = torch.tensor([0, *q_seqlen]).cumsum(0)
            return mask

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, *, scale: float) -> Tensor:
        assert q.shape == k.shape == v.shape  # it does not broadcast
        assert q.dim() in (4, 5) and q.shape[0] == 1
        assert not (q.dim() == 5 and (q.requires_grad or k.requires_grad or v.requires_grad))  # no such backward
        heads = [x[0].flatten(1, -2) for x in (q, k, v)]
        return document_by_document(*heads, attn_bias.ends, scale).to(q.dtype).reshape(q.shape)

    install(monkeypatch, "xformers")
    install(monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
    install(monkeypatch, "xformers.ops.fmha")
    install(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalCausalMask=BlockDiagonalCausalMask)


def assert_the_same_on(layout: PackedLayout, on_host: PackedLayout, tensors: list[Tensor], backend: str) -> None:
    right = with_gradients(exact(on_host), *(x.double() for x in tensors))
    found = with_gradients(run(backend, layout), *tensors)
    assert all(mine.dtype == torch.float16 and mine.shape == wanted.shape for mine, wanted in zip(found, right, strict=True))
    assert_accurate(found, with_gradients(torch_operation(on_host), *tensors), right)
    with torch.no_grad():  # where xformers shares heads
        assert_accurate([run(backend, layout)(*tensors[:3])], found[:1], right[:1])


INSTALLATIONS = {
    "varlen, 2.13": ("varlen", 8, lambda patch: install_varlen(patch, shares_heads_when_told=True)),
    "varlen, 2.11": ("varlen", 8, lambda patch: install_varlen(patch, shares_heads_when_told=False)),
    "flash-attn 2": ("flash-attn", 8, lambda patch: install_flash_attn(patch, "flash_attn", False)),
    "flash-attn 2 on Hopper": ("flash-attn", 9, lambda patch: install_flash_attn(patch, "flash_attn", False)),
    "flash-attn 3": ("flash-attn", 9, lambda patch: install_flash_attn(patch, "flash_attn_interface", False)),
    "flash-attn 3, early": ("flash-attn", 9, lambda patch: install_flash_attn(patch, "flash_attn_interface", True)),
    "xformers": ("xformers", 8, install_xformers),
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("backend", "generation", "prepare"), INSTALLATIONS.values(), ids=INSTALLATIONS)
def test_varlen_libraries_get_equivalent_arguments(
    backend: str, generation: int, prepare: Callable[[pytest.MonkeyPatch], None], layout: PackedLayout, heads: tuple[int, int],
    pretended_gpu: Callable[[int], None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pretended_gpu(generation)
    prepare(monkeypatch)
    tensors = inputs(len(layout), heads, torch.float16)
    tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)  # a row is not contiguous
    assert_the_same_on(layout, layout, tensors, backend)


@pytest.mark.parametrize(("backend", "generation", "prepare"), INSTALLATIONS.values(), ids=INSTALLATIONS)
def test_lengths_may_be_on_the_device_alone(
    backend: str, generation: int, prepare: Callable[[pytest.MonkeyPatch], None], pretended_gpu: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pretended_gpu(generation)
    prepare(monkeypatch)
    tensors = inputs(40, (4, 2), torch.float16)
    if backend == "xformers":
        with pytest.raises(ValueError, match="backend 'xformers' needs the lengths on the host"):
            run(backend, on_the_device_alone())(*tensors[:3])
    else:
        assert_the_same_on(on_the_device_alone(), PackedLayout.from_lengths([9, 11, 20]), tensors, backend)
    assert_the_same_on(on_the_device_alone(), PackedLayout.from_lengths([9, 11, 20]), tensors, "sdpa")


def test_flash_attn_is_deterministic_where_torch_is_asked_to_be(
    pretended_gpu: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_flash_attn(monkeypatch, "flash_attn", False)
    torch.use_deterministic_algorithms(True)
    try:
        run("flash-attn", LAYOUTS["pairs"])(*inputs(40, (2, 1), torch.float16)[:3])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["sdpa", "flex", "varlen"])
def test_under_a_compiler_each_layout_keeps_its_own_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install_varlen(monkeypatch, shares_heads_when_told=True)
    monkeypatch.setattr(varlen, "varlen_attn", torch.compiler.disable(varlen.varlen_attn))  # opaque, as the real one
    torch._dynamo.reset()
    q, k, v, _ = inputs(40, (4, 2), torch.float16)
    compiled = torch.compile(lambda q, k, v, layout: run(name, layout)(q, k, v) * 2, backend="eager")
    for _ in range(2):
        for layout in (LAYOUTS["one"], LAYOUTS["documents"], PackedLayout.from_lengths([20, 20]), LAYOUTS["pairs"]):
            assert torch.equal(compiled(q, k, v, layout), run(name, layout)(q, k, v) * 2)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(run(name, LAYOUTS["one"]), backend="eager", fullgraph=True)(q, k, v)


@pytest.mark.parametrize("backend", DOCUMENTS_ALONE)
def test_a_library_that_cannot_run_here_is_refused(
    backend: str, monkeypatch: pytest.MonkeyPatch, pretended_gpu: Callable[[int], None]
) -> None:
    find = third_party.find_library
    with pytest.raises(ValueError, match=f"'{backend}' needs CUDA tensors, these are on cpu: use backend 'torch' or 'sdpa'"):
        monkeypatch.undo()
        run(backend, LAYOUTS["documents"])(*inputs(40, (2, 1), torch.float16)[:3])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=f"'{backend}' needs a GPU of the Ampere generation"):
        find(backend, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    module, name = third_party.LIBRARIES[backend]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"'{backend}' lacks {module}.{name} .*: install it"):
        find(backend, None)
    install(monkeypatch, module)
    with pytest.raises(ValueError, match=f"'{backend}' lacks {module}.{name} .*: install it"):
        find(backend, None)


@pytest.mark.parametrize("backend", DOCUMENTS_ALONE)
@pytest.mark.usefixtures("pretended_gpu")
def test_input_that_a_varlen_library_cannot_express_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash_attn(monkeypatch, "flash_attn", False)
    install_xformers(monkeypatch)
    q, k, v, _ = inputs(12, (2, 1), torch.float16)
    layout = PackedLayout.from_lengths([12])
    for arguments, message in [
        ((q, k, v, SHARED_SEED), "cannot express partners that share a seed: use 'triton', 'flex' or repeat the seed"),
        ((q.double(), k.double(), v.double(), layout), rf"q is torch.float64: backend '{backend}' takes bfloat16 and float16"),
        ((q[..., :4], k[..., :4], v[..., :4], layout), "width 4: .* multiples of 8 up to 256"),
        ((q[..., :0], k[..., :0], v[..., :0], layout), "width 0: .* multiples of 8 up to 256"),
        ((*(x.repeat(1, 1, 33) for x in (q, k, v)), layout), "width 264: .* multiples of 8 up to 256"),
        ((q[:0], k[:0], v[:0], PackedLayout.from_lengths([])), "layout has no tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_backend(backend).attend(*arguments, SCALE, False)


@pytest.mark.usefixtures("pretended_gpu")
def test_float32_is_for_xformers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash_attn(monkeypatch, "flash_attn", False)
    install_xformers(monkeypatch)
    tensors = inputs(40, (2, 1), torch.float32)[:3]
    for backend in ("varlen", "flash-attn"):
        with pytest.raises(ValueError, match=rf"q is torch.float32: backend '{backend}' takes bfloat16 and float16"):
            run(backend, LAYOUTS["pairs"])(*tensors)
    assert run("xformers", LAYOUTS["pairs"])(*tensors).dtype == torch.float32
