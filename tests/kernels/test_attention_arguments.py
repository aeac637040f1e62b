"""What attention takes and refuses, with every backend of its own."""

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import inputs
from sbp_kernels import PackedLayout, packed_attention, resolve_backend
from trees import error

KERNELS = ["triton", "triton-hopper"]


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
def test_softmax_scale_and_an_empty_sequence(backend: str) -> None:
    q, k, v, _ = inputs(5, (2, 2), torch.float32, 16)
    layout = PackedLayout.from_lengths([5])
    theirs, right = (
        F.scaled_dot_product_attention(*(x.transpose(0, 1).to(dtype) for x in (q, k, v)), is_causal=True, scale=0.3)
        for dtype in (torch.float32, torch.float64)
    )
    mine = packed_attention(q, k, v, layout, softmax_scale=0.3, backend=backend).transpose(0, 1)
    assert error(mine, right) <= 2 * max(error(theirs, right), error(right.float(), right))
    empty = packed_attention(q[:0], k[:0], v[:0], PackedLayout.from_lengths([]), backend=backend)
    assert empty.shape == (0, 2, 16)


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = inputs(6, (4, 2), torch.float32)
    layout = PackedLayout.from_lengths([6])
    for arguments, message in [
        ((q, k, v[:, :1], layout), "k and v alike"),
        ((q, k, v, PackedLayout.from_lengths([5])), "differ in tokens: 6, 6, 5"),
        ((q[:, :3], k, v, layout), "heads of q must be a multiple"),
        ((q[..., :4], k, v, layout), "widths equal"),
        ((q.double(), k, v, layout), "share dtype"),
        ((q.to("meta"), k.to("meta"), v.to("meta"), layout), r"layout is on cpu, q on meta: use layout.to\(q.device\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_attention(*arguments)
    with pytest.raises(ValueError, match=r"backend 'cutlass' is unknown: use auto, torch, .*\btriton\b"):
        packed_attention(q, k, v, layout, backend="cutlass")
    with pytest.raises(ValueError, match="softmax_scale must be positive, got 0"):
        packed_attention(q, k, v, layout, softmax_scale=0)
    with pytest.raises(ValueError, match=r"q is torch\.float64: backend 'triton' takes bfloat16, float16 and float32"):
        packed_attention(q.double(), k.double(), v.double(), layout, backend="triton")
    wide = torch.zeros(6, 1, 300)
    with pytest.raises(ValueError, match="q has heads of width 300: backend 'triton' takes up to 256"):
        packed_attention(wide, wide, wide, layout, backend="triton")
    with pytest.raises(ValueError, match="q has heads of width 8: backend 'triton-hopper' takes 16, 32, 64 and 128"):
        packed_attention(q, k, v, layout, backend="triton-hopper")
    with pytest.raises(ValueError, match="backend 'gluon-hopper' needs CUDA tensors, these are on cpu: use backend 'torch'"):
        packed_attention(q, k, v, layout, backend="gluon-hopper")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend 'triton' needs CUDA tensors, these are on cpu: use backend 'torch'"):
        packed_attention(q, k, v, layout, backend="triton")


def test_auto_is_triton_on_cuda_and_torch_elsewhere() -> None:
    assert [resolve_backend("auto", device) for device in ("cuda", "cpu")] == ["triton", "torch"]
