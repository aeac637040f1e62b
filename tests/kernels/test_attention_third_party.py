"""Third-party attention of torch: sdpa and flex; on a GPU all third-party backends."""

import functools
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sbp_kernels import PackedLayout, resolve_backend
from sbp_kernels.attention import third_party
from third_party_attention import (
    DOCUMENTS_ALONE,
    HEADS,
    LAYOUTS,
    SCALE,
    THIRD_PARTY,
    assert_accurate,
    exact,
    inputs,
    log_sum_exp,
    run,
    torch_operation,
    with_gradients,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask
from trees import error, trees


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
    out, lse = third_party.flex_attention(q, k, v, layout, SCALE, True)
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
        patch.setattr(third_party, "BLOCK", block)
        found = third_party._block_mask(layout)
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

    monkeypatch.setattr(third_party, "F", types.SimpleNamespace(scaled_dot_product_attention=spy))
    for layout in (LAYOUTS["one"], LAYOUTS["documents"]):
        third_party.sdpa_attention(*inputs(40, (4, 2), torch.float32)[:3], layout, SCALE, False)
    third_party.sdpa_attention(*inputs(24, (4, 2), torch.float32)[:3], PackedLayout.from_pairs([(9, 15)]), SCALE, False)
    assert [mask is None for mask in masks] == [True, False, True]


def test_masks_of_a_layout_are_shared_by_layers_and_freed_with_it() -> None:
    layout = PackedLayout.from_lengths([3, 5])
    for make in (third_party._documents, third_party._dense_mask, third_party._block_mask):
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
    attention = third_party._compiled_flex_attention.__wrapped__()

    def attend(layout: PackedLayout, width: int) -> None:
        q, k, v = (x.transpose(0, 1)[None] for x in inputs(len(layout), (4, 2), torch.float32, width)[:3])
        attention(q, k, v, block_mask=third_party._block_mask(layout), enable_gqa=True)

    for lengths, parents in [([300], [-1]), ([200, 100], [-1, -1]), ([99, 1, 200], [-1, 0, 0]), ([30] * 10, [-1] * 10)]:
        attend(PackedLayout.from_tree(lengths, parents), 16)
    assert counter.frame_count == 1
    with torch._dynamo.config.patch(recompile_limit=2):
        attend(PackedLayout.from_lengths([300]), 32)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            attend(PackedLayout.from_lengths([300]), 64)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_has_no_gradients_on_the_cpu() -> None:
    layout = PackedLayout.from_lengths([6])
    q, k, v, _ = inputs(6, (2, 1), torch.float32)
    with pytest.raises(ValueError, match="backend 'flex' has no gradients on cpu: use backend 'torch' or 'sdpa'"):
        third_party.flex_attention(q, k, v.requires_grad_(), layout, SCALE, False)
    with torch.no_grad():
        assert third_party.flex_attention(q, k, v, layout, SCALE, False)[0].shape == q.shape
    with pytest.raises(ValueError, match="layout has no tokens: backend 'flex'"):
        third_party.flex_attention(q[:0], k[:0], v[:0], PackedLayout.from_lengths([]), SCALE, False)
    assert third_party.sdpa_attention(q[:0], k[:0], v[:0], PackedLayout.from_lengths([]), SCALE, False)[0].shape == (0, 2, 8)


def on_gpu(backend: str) -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    if backend in third_party.LIBRARIES:
        try:
            resolve_backend(backend, device)
        except ValueError as problem:
            pytest.skip(str(problem))
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("backend", THIRD_PARTY)
def test_on_a_gpu(backend: str, width: int, heads: tuple[int, int]) -> None:
    device = on_gpu(backend)
    if backend == "flash-attn-4" and width == 64:
        pytest.skip("it takes wider heads alone")
    for layout in [
        PackedLayout.from_lengths([700, 1, 64, 235]),
        PackedLayout.from_pairs([(100, 300), (257, 343)]),
        PackedLayout.from_lengths([1000]),
        *([] if backend in DOCUMENTS_ALONE else [PackedLayout.from_tree([300, 200, 100, 150, 250], [-1, 0, 1, 0, -1])]),
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
        return lambda q, k, v: third_party.flex_attention(q, k, v, layout, SCALE, True)[1] + 0 * v.sum()

    weights = torch.randn(4, 600, device=device)
    found = with_gradients(lse(layout.to(device)), q, k, v, weights)
    right, torchs = (
        with_gradients(lambda q, k, v: log_sum_exp(q, k, layout) + 0 * v.sum(), *tensors, weights)
        for tensors in ([x.double() for x in (q, k, v)], [q, k, v])
    )
    assert_accurate(found, torchs, right)
