"""Other libraries as backends of attention; where they need a GPU, what they are given is computed by plain torch here."""

import functools
import gc
import importlib.machinery
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sbp_kernels import PackedLayout
from sbp_kernels.attention import peers
from sbp_kernels.reference import dense_mask
from sbp_kernels.reference import packed_attention as exact_attention
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import create_block_mask
from trees import error, rounding, trees

SCALE = 0.3
HEADS = st.sampled_from([(4, 4), (4, 2), (3, 1)])
DOCUMENTS_ALONE = ["varlen", "flash-attn", "xformers"]
LAYOUTS = {
    "one": PackedLayout.from_lengths([40]),
    "documents": PackedLayout.from_lengths([7, 1, 30, 2]),
    "pairs": PackedLayout.from_pairs([(5, 9), (1, 1), (16, 8)]),
    "chains": PackedLayout.from_tree([3, 4, 5, 6, 22], [-1, 0, 1, -1, 3]),
}
SHARED_SEED = PackedLayout.from_tree([4, 3, 5], [-1, 0, 0])


def on_the_device_alone() -> PackedLayout:
    """Documents of 9, 11 and 20 tokens as if their `cu_seqlens` had been on a device."""
    on_host = PackedLayout.from_lengths([9, 11, 20])
    return replace(on_host, lengths=None, parents=None, cu_seqlens=torch.tensor([0, 9, 20, 40, 40], dtype=torch.int32))


def inputs(tokens: int, heads: tuple[int, int], dtype: torch.dtype, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, count, width) for count in (heads[0], heads[1], heads[1], heads[0])]  # q, k, v, gradient of the output
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out))]


def run(name: str, layout: PackedLayout) -> Callable[..., Tensor]:
    return lambda q, k, v: peers.PEERS[name](q, k, v, layout, SCALE, False)[0]


def exact(layout: PackedLayout) -> Callable[..., Tensor]:
    return lambda q, k, v: exact_attention(q, k, v, layout, SCALE)


def torch_operation(layout: PackedLayout) -> Callable[..., Tensor]:
    """What torch itself has for any mask, in the inputs' own dtype."""
    mask = dense_mask(layout)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask.to(q.device), scale=SCALE, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    return attention


def log_sum_exp(q: Tensor, k: Tensor, layout: PackedLayout) -> Tensor:
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * SCALE
    return scores.masked_fill(~dense_mask(layout).to(q.device), float("-inf")).logsumexp(-1)


def assert_accurate(found: list[Tensor], torchs: list[Tensor], right: list[Tensor]) -> None:
    """Errors from float64 are at most twice those of torch's operation."""
    for mine, theirs, wanted in zip(found, torchs, right, strict=True):
        assert error(mine, wanted) <= 2 * max(error(theirs, wanted), rounding(wanted, mine.dtype))


@settings(max_examples=30)
@given(trees(), HEADS)
def test_sdpa_equals_the_definition_in_float64(layout: PackedLayout, heads: tuple[int, int]) -> None:
    tensors = inputs(len(layout), heads, torch.float64)
    for mine, right in zip(with_gradients(run("sdpa", layout), *tensors), with_gradients(exact(layout), *tensors), strict=True):
        assert error(mine, right) < 1e-14


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=20)
@given(trees(maximum_segments=8, maximum_length=60), HEADS)
def test_flex_equals_the_definition_in_float64(layout: PackedLayout, heads: tuple[int, int]) -> None:
    q, k, v, _ = inputs(len(layout), heads, torch.float64)
    out, lse = peers.flex_attention(q, k, v, layout, SCALE, True)
    assert lse is not None and error(out, exact(layout)(q, k, v)) < 1e-14
    assert error(lse, log_sum_exp(q, k, layout)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=8)
@given(layout=trees(maximum_segments=6, maximum_length=60), heads=HEADS)
def test_errors_are_at_most_twice_those_of_torchs_operation(
    dtype: torch.dtype, layout: PackedLayout, heads: tuple[int, int]
) -> None:
    tensors = inputs(len(layout), heads, dtype, width=32)
    right = with_gradients(exact(layout), *(x.double() for x in tensors))
    torchs = with_gradients(torch_operation(layout), *tensors)
    assert_accurate(with_gradients(run("sdpa", layout), *tensors), torchs, right)
    assert_accurate([run("flex", layout)(*tensors[:3])], torchs[:1], right[:1])


@settings(max_examples=60)
@given(trees(maximum_segments=8, maximum_length=12), st.sampled_from([2, 4, 16]))
def test_the_block_mask_is_the_one_that_torch_makes_of_the_dense_mask(layout: PackedLayout, block: int) -> None:
    tokens, until = len(layout), layout.visible_until

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < until[key])

    right = create_block_mask(visible, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "BLOCK", block)
        found = peers._block_mask(layout)
    assert found.shape == right.shape and found.BLOCK_SIZE == right.BLOCK_SIZE
    for side in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(right, f"{side}_num_blocks")
        assert torch.equal(getattr(found, f"{side}_num_blocks"), counts)
        used = torch.arange(counts.shape[-1]) < counts[..., None]
        mine, theirs = (getattr(mask, f"{side}_indices")[used] for mask in (found, right))
        assert torch.equal(mine, theirs)


def test_a_single_document_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        masks.append(mask)
        return F.scaled_dot_product_attention(q, k, v, mask, **options)

    monkeypatch.setattr(peers, "F", types.SimpleNamespace(scaled_dot_product_attention=spy))
    for layout in (LAYOUTS["one"], LAYOUTS["documents"]):
        peers.sdpa_attention(*inputs(40, (4, 2), torch.float32)[:3], layout, SCALE, False)
    peers.sdpa_attention(*inputs(24, (4, 2), torch.float32)[:3], PackedLayout.from_pairs([(9, 15)]), SCALE, False)
    assert [mask is None for mask in masks] == [True, False, True]


def test_what_is_made_of_a_layout_is_shared_by_layers_and_freed_with_it() -> None:
    layout = PackedLayout.from_lengths([3, 5])
    for make in (peers._documents, peers._dense_mask, peers._block_mask):
        assert make(layout) is make(layout)
        assert make(layout) is not make(PackedLayout.from_lengths([3, 5]))
    alive = weakref.ref(layout)
    del layout
    gc.collect()
    assert alive() is None


def test_flex_compiles_once_for_all_lengths_and_never_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is compiled on CUDA, with a compiler that counts in place of the one that makes kernels."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    attention = peers._compiled_flex_attention.__wrapped__()

    def attend(layout: PackedLayout, width: int) -> None:
        q, k, v = (x.transpose(0, 1)[None] for x in inputs(len(layout), (4, 2), torch.float32, width)[:3])
        attention(q, k, v, block_mask=peers._block_mask(layout), enable_gqa=True)

    for lengths, parents in [([300], [-1]), ([200, 100], [-1, -1]), ([99, 1, 200], [-1, 0, 0]), ([30] * 10, [-1] * 10)]:
        attend(PackedLayout.from_tree(lengths, parents), 16)
    assert counter.frame_count == 1
    with torch._dynamo.config.patch(recompile_limit=2):
        attend(PackedLayout.from_lengths([300]), 32)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            attend(PackedLayout.from_lengths([300]), 64)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the backends take CPU tensors as if they were on a GPU of that generation."""
    find = peers.find_library.__wrapped__

    def pretend(generation: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
        monkeypatch.setattr(peers, "find_library", lambda backend, device: find(backend, torch.device("cuda")))

    pretend(8)
    return pretend


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


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
def test_libraries_for_documents_are_given_what_means_the_same(
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
    find = peers.find_library
    with pytest.raises(ValueError, match=f"'{backend}' needs CUDA tensors, these are on cpu: use backend 'torch' or 'sdpa'"):
        monkeypatch.undo()
        run(backend, LAYOUTS["documents"])(*inputs(40, (2, 1), torch.float16)[:3])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=f"'{backend}' needs a GPU of the Ampere generation"):
        find(backend, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    module, name = peers.LIBRARIES[backend]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"'{backend}' lacks {module}.{name} .*: install it"):
        find(backend, None)
    install(monkeypatch, module)
    with pytest.raises(ValueError, match=f"'{backend}' lacks {module}.{name} .*: install it"):
        find(backend, None)


@pytest.mark.parametrize("backend", DOCUMENTS_ALONE)
@pytest.mark.usefixtures("pretended_gpu")
def test_what_a_library_for_documents_cannot_express_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
            peers.PEERS[backend](*arguments, SCALE, False)


@pytest.mark.usefixtures("pretended_gpu")
def test_float32_is_for_xformers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash_attn(monkeypatch, "flash_attn", False)
    install_xformers(monkeypatch)
    tensors = inputs(40, (2, 1), torch.float32)[:3]
    for backend in ("varlen", "flash-attn"):
        with pytest.raises(ValueError, match=rf"q is torch.float32: backend '{backend}' takes bfloat16 and float16"):
            run(backend, LAYOUTS["pairs"])(*tensors)
    assert run("xformers", LAYOUTS["pairs"])(*tensors).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_has_no_gradients_on_the_cpu() -> None:
    layout = PackedLayout.from_lengths([6])
    q, k, v, _ = inputs(6, (2, 1), torch.float32)
    with pytest.raises(ValueError, match="backend 'flex' has no gradients on cpu: use backend 'torch' or 'sdpa'"):
        peers.flex_attention(q, k, v.requires_grad_(), layout, SCALE, False)
    with torch.no_grad():
        assert peers.flex_attention(q, k, v, layout, SCALE, False)[0].shape == q.shape
    with pytest.raises(ValueError, match="layout has no tokens: backend 'flex'"):
        peers.flex_attention(q[:0], k[:0], v[:0], PackedLayout.from_lengths([]), SCALE, False)
    assert peers.sdpa_attention(q[:0], k[:0], v[:0], PackedLayout.from_lengths([]), SCALE, False)[0].shape == (0, 2, 8)


def on_gpu(backend: str) -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    if backend in peers.LIBRARIES:
        try:
            peers.find_library(backend, device)
        except ValueError as problem:
            pytest.skip(str(problem))
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("backend", peers.PEERS)
def test_on_a_gpu(backend: str, width: int, heads: tuple[int, int]) -> None:
    device = on_gpu(backend)
    for layout in [
        PackedLayout.from_lengths([700, 1, 64, 235]),
        PackedLayout.from_pairs([(100, 300), (257, 343)]),
        PackedLayout.from_lengths([1000]),
        *([] if backend in peers.LIBRARIES else [PackedLayout.from_tree([300, 200, 100, 150, 250], [-1, 0, 1, 0, -1])]),
    ]:
        tensors = [x.to(device) for x in inputs(len(layout), heads, torch.bfloat16, width)]
        found = with_gradients(run(backend, layout.to(device)), *tensors)
        right = with_gradients(exact(layout), *(x.double() for x in tensors))
        assert_accurate(found, with_gradients(torch_operation(layout), *tensors), right)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flash-attn"])
def test_lengths_on_the_device_alone_on_a_gpu(backend: str) -> None:
    device = on_gpu(backend)
    ends = torch.tensor([0, 300, 301, 900], device=device)
    tensors = [x.to(device) for x in inputs(1000, (8, 2), torch.bfloat16, 64)]
    found = with_gradients(run(backend, PackedLayout.from_cu_seqlens(ends, tokens=1000)), *tensors)
    on_host = PackedLayout.from_lengths([300, 1, 599, 100])
    right = with_gradients(exact(on_host), *(x.double() for x in tensors))
    assert_accurate(found, with_gradients(torch_operation(on_host), *tensors), right)


@pytest.mark.gpu
def test_the_log_sum_exp_of_flex_has_gradients_on_a_gpu() -> None:
    device = on_gpu("flex")
    layout = PackedLayout.from_tree([300, 200, 100], [-1, 0, 0])
    q, k, v, _ = (x.to(device) for x in inputs(600, (4, 2), torch.bfloat16, 64))

    def lse(layout: PackedLayout) -> Callable[..., Tensor]:
        return lambda q, k, v: peers.flex_attention(q, k, v, layout, SCALE, True)[1] + 0 * v.sum()

    weights = torch.randn(4, 600, device=device)
    found = with_gradients(lse(layout.to(device)), q, k, v, weights)
    right, torchs = (
        with_gradients(lambda q, k, v: log_sum_exp(q, k, layout) + 0 * v.sum(), *tensors, weights)
        for tensors in ([x.double() for x in (q, k, v)], [q, k, v])
    )
    assert_accurate(found, torchs, right)
