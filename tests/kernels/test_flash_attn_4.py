"""FlashAttention-4 as a backend: a dense evaluation of the mask and the lists that it would be given stands in for it."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from sbp_kernels import PackedLayout
from sbp_kernels.attention import flash_attn_4, third_party
from third_party_attention import (
    LAYOUTS,
    SCALE,
    SHARED_SEED,
    assert_accurate,
    exact,
    inputs,
    install,
    log_sum_exp,
    on_the_device_alone,
    run,
    torch_operation,
    with_gradients,
)
from torch import Tensor
from torch.torch_version import TorchVersion
from trees import error, trees

ROOT = Path(__file__).parents[2]


class BlockSparseTensorsTorch(NamedTuple):
    """The fields of flash-attn-4 4.0.0b36, in its order."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: Tensor | None = None
    dq_write_order_full: Tensor | None = None
    spt: bool | None = None


def written_out(lists: BlockSparseTensorsTorch, rule: Tensor, rows: int, columns: int) -> Tensor:
    """Visible pairs [T, T] by the lists of blocks: all pairs of full blocks, and those of partial blocks that the rule lets."""
    tokens = len(rule)
    blocks, others = -(-tokens // rows), -(-tokens // columns)
    visible = torch.zeros_like(rule)
    for counts, indices, of_block in (
        (lists.mask_block_cnt, lists.mask_block_idx, rule),
        (lists.full_block_cnt, lists.full_block_idx, torch.ones_like(rule)),
    ):
        assert counts is not None and counts.shape == (1, 1, blocks) and counts.dtype == torch.int32
        assert indices is not None and indices.shape == (1, 1, blocks, others) and indices.dtype == torch.int32
        for block in range(blocks):
            for other in indices[0, 0, block, : counts[0, 0, block]].tolist():
                pairs = slice(block * rows, (block + 1) * rows), slice(other * columns, (other + 1) * columns)
                assert not visible[pairs].any(), "a block in two lists"
                visible[pairs] = of_block[pairs]
    return visible


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, mask_mod: Callable[..., Tensor], aux_tensors: list[Tensor],
    block_sparse_tensors: BlockSparseTensorsTorch, block_sparse_tensors_bwd: BlockSparseTensorsTorch, return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What the library computes, in float64: lists by query for the forward pass, and by key for the backward pass."""
    assert q.shape[0] == k.shape[0] == 1 and q.dim() == 4 and q.dtype in (torch.float16, torch.bfloat16)
    token = torch.arange(q.shape[1])
    rule = mask_mod(None, None, token[:, None], token[None], None, aux_tensors)
    size = block_sparse_tensors.block_size
    assert size is not None and size == block_sparse_tensors_bwd.block_size
    visible = written_out(block_sparse_tensors, rule, *size)
    assert visible.equal(written_out(block_sparse_tensors_bwd, rule.T, *size[::-1]).T)
    keys, values = (x[0].double().repeat_interleave(q.shape[2] // x.shape[2], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q[0].double(), keys) * softmax_scale
    scores = scores.masked_fill(~visible, float("-inf"))
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), values).to(q.dtype)
    return out[None], scores.logsumexp(-1)[None] if return_lse else None


def forget() -> None:
    flash_attn_4.find_flash_attn_4.cache_clear()
    flash_attn_4.tree_mask.cache_clear()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for flash-attn-4 and CuTe on a pretended Hopper GPU, and blocks small enough for small trees."""
    install(monkeypatch, "flash_attn")
    install(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_func)
    install(monkeypatch, "flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=BlockSparseTensorsTorch)
    install(monkeypatch, "flash_attn.cute.utils", scalar_to_ssa=lambda value, dtype: value.to(dtype))
    install(monkeypatch, "cutlass", Int32=torch.int32)
    install(monkeypatch, "cutlass.cute", jit=lambda function: function)
    find = third_party.find_library.__wrapped__
    monkeypatch.setattr(flash_attn_4, "find_library", lambda backend, device: find(backend, torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash_attn_4, "BLOCKS", {9: (8, 8), 10: (16, 8)})
    monkeypatch.setattr(flash_attn_4, "WIDTHS", range(8, 129, 8))
    monkeypatch.setattr(flash_attn_4, "version", {"flash-attn-4": "4.0.0b36"}.__getitem__)
    forget()
    yield
    forget()


@pytest.mark.usefixtures("library")
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees(maximum_segments=8, maximum_length=20))
def test_any_tree_equals_the_definition(layout: PackedLayout) -> None:
    tensors = inputs(len(layout), (4, 2), torch.float16)
    right = with_gradients(exact(layout), *(x.double() for x in tensors))
    assert_accurate(
        with_gradients(run("flash-attn-4", layout), *tensors), with_gradients(torch_operation(layout), *tensors), right
    )


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("generation", [9, 10])
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), SHARED_SEED], ids=[*LAYOUTS, "shared seed"])
def test_the_log_sum_exp_equals_the_definition(layout: PackedLayout, generation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    q, k, v, _ = inputs(len(layout), (4, 2), torch.float16)
    _, lse = flash_attn_4.flash_attn_4_attention(q, k, v, layout, SCALE, True)
    assert lse is not None and error(lse, log_sum_exp(q.double(), k.double(), layout)) < 1e-14
    assert flash_attn_4.flash_attn_4_attention(q, k, v, layout, SCALE, False)[1] is None


@pytest.mark.usefixtures("library")
def test_lists_of_a_layout_are_made_once() -> None:
    layout = PackedLayout.from_tree([4, 3, 5], [-1, 0, 0])
    assert flash_attn_4._lists_of(layout) is flash_attn_4._lists_of(layout)
    assert flash_attn_4._lists_of(layout) is not flash_attn_4._lists_of(PackedLayout.from_tree([4, 3, 5], [-1, 0, 0]))


@pytest.mark.usefixtures("library")
def test_gradients_are_refused_where_torch_is_asked_for_equal_bits() -> None:
    q, k, v, _ = inputs(12, (2, 1), torch.float16)
    torch.use_deterministic_algorithms(True)
    try:
        run("flash-attn-4", SHARED_SEED)(q, k, v)
        with pytest.raises(ValueError, match=r"gradients of backend 'flash-attn-4' are not deterministic, .*: use 'triton'"):
            run("flash-attn-4", SHARED_SEED)(q.requires_grad_(), k, v)
        with torch.no_grad():
            run("flash-attn-4", SHARED_SEED)(q, k, v)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("library")
def test_input_that_flash_attn_4_does_not_take_is_refused() -> None:
    q, k, v, _ = inputs(12, (2, 1), torch.float16)
    for arguments, message in [
        ((q.float(), k.float(), v.float(), SHARED_SEED), "q is torch.float32: .* takes bfloat16 and float16"),
        ((q[..., :4], k[..., :4], v[..., :4], SHARED_SEED), "width 4: .* multiples of 8 from 8 to 128"),
        ((*(x.repeat(1, 1, 17) for x in (q, k, v)), SHARED_SEED), "width 136: .* multiples of 8 from 8 to 128"),
        ((q[:0], k[:0], v[:0], PackedLayout.from_lengths([])), "layout has no tokens"),
        ((*inputs(40, (2, 1), torch.float16)[:3], on_the_device_alone()), "needs the lengths on the host"),
    ]:
        with pytest.raises(ValueError, match=message):
            flash_attn_4.flash_attn_4_attention(*arguments, SCALE, False)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("installed", ["4.0.0b20", "4.0.0b9"])
def test_an_early_flash_attn_4_is_refused(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn_4, "version", lambda package: installed)
    with pytest.raises(ValueError, match=f"needs flash-attn-4 4.0.0b36 or newer: {installed} may give wrong gradients"):
        flash_attn_4.find_flash_attn_4(torch.device("cuda"))


@pytest.mark.usefixtures("library")
def test_a_gpu_or_machine_without_flash_attn_4_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 9.0 or 10.x, this one has .* 8.6: use 'triton'"):
        flash_attn_4.find_flash_attn_4(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    with pytest.raises(ValueError, match=r"lacks flash_attn.cute.flash_attn_func .*: install it or use 'triton'"):
        flash_attn_4.find_flash_attn_4(torch.device("cuda"))


@pytest.mark.usefixtures("library")
def test_under_a_compiler_each_layout_keeps_its_own_lists() -> None:
    torch._dynamo.reset()
    q, k, v, _ = inputs(40, (4, 2), torch.float16)
    compiled = torch.compile(lambda q, k, v, layout: run("flash-attn-4", layout)(q, k, v) * 2, backend="eager")
    for _ in range(2):
        for layout in LAYOUTS.values():
            assert torch.equal(compiled(q, k, v, layout), run("flash-attn-4", layout)(q, k, v) * 2)


def test_flash_attn_4_without_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match="'flash-attn-4' needs CUDA tensors, these are on cpu"):
        run("flash-attn-4", SHARED_SEED)(*inputs(12, (2, 1), torch.float16, 128)[:3])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_forward_and_backward_compile_without_a_gpu(target: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.aot.flash_attn_4", "--target", target], cwd=ROOT, capture_output=True, text=True
    )
    if "is not installed" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert f"{target}: forward and backward compile" in done.stdout


def test_the_stand_in_has_the_fields_of_the_library() -> None:
    module = pytest.importorskip("flash_attn.cute.block_sparsity", reason="flash-attn-4 is not installed")
    assert module.BlockSparseTensorsTorch._fields == BlockSparseTensorsTorch._fields


def test_extras_and_the_makefile_ask_for_releases_that_the_backend_takes() -> None:
    for path in (ROOT / "pyproject.toml", ROOT / "kernels/pyproject.toml"):
        extras = tomllib.loads(path.read_text("utf-8"))["project"]["optional-dependencies"]
        assert extras["flash-attn-4"] == [f"flash-attn-4[cu13]>={flash_attn_4.OLDEST}"]
    (compiled,) = re.findall(r"flash-attn-4==(\S+)", (ROOT / "Makefile").read_text("utf-8"))
    assert TorchVersion(compiled) >= flash_attn_4.OLDEST
