"""`decode_attention` and `append_to_pages`: the newest token of each sample against paged keys and values."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from sbp_kernels._backends import check_device
from sbp_kernels._registration import register_operation
from sbp_kernels.decode.layout import DecodeLayout

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAGE_TOKENS = (16, 32, 64, 128)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, layout: DecodeLayout, *, softmax_scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attention of each row's newest token over the tokens of its seed and its own, the newest among them.

    A row's result depends on no other row. Under "triton" it is the same bits whatever the batch holds besides, in layouts for
    as many samples a group, and a seed's keys and values are read once for all of its samples. Not differentiable.

    Args:
        q: [B, H, D] queries; H is a multiple of K (grouped-query attention).
        keys: [pages, K, P, D] of float32, bfloat16, float16 or float8_e4m3fn, with P tokens a page, a power of two from 16 to
            128. Numbers in float8 are stored as they are, at scale 1, and all are converted to the dtype of q when read.
        values: like keys.
        layout: of the same rows.
        softmax_scale: factor of the scores, positive; D ** -0.5 by default.
        backend: "triton", for CUDA tensors (and for any where TRITON_INTERPRET=1 is set, which is slow and for checking);
            "numba", for float32 on the CPU; "torch", for every device and dtype; or "auto", the first of these that can run.

    Returns:
        [B, H, D] in the dtype of q, zeros for idle rows.

    Raises:
        ValueError: naming the argument that does not fit and what would, or a backend that cannot run here.
    """
    _check(q, keys, values, layout, "q")
    if q.shape[1] % keys.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, keys {keys.shape[1]}: heads of q must be a multiple")
    softmax_scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {softmax_scale}")
    return BACKENDS[_resolved(backend, q, keys, values)](q, keys, values, layout, softmax_scale)


def append_to_pages(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, layout: DecodeLayout, *, backend: str = "auto") -> None:
    """Write each row's newest key and value, in place, where its own token `own_tokens` - 1 lies; idle rows' into page 0.

    Args:
        keys: [pages, K, P, D], see `decode_attention`; numbers beyond the range of float8 become its largest.
        values: like keys.
        k: [B, K, D].
        v: like k.
        layout: of the same rows.
        backend: "triton", "torch", or "auto": Triton for CUDA tensors, else torch.

    Raises:
        ValueError: as `decode_attention`.
    """
    _check(k, keys, values, layout, "k")
    if k.shape[1] != keys.shape[1] or (v.shape, v.dtype, v.device) != (k.shape, k.dtype, k.device):
        raise ValueError(f"k and v must be [B, {keys.shape[1]}, D], alike: got {tuple(k.shape)}, {tuple(v.shape)}")
    resolved = _resolved("torch" if backend == "auto" and not k.is_cuda else backend, k, keys, values)
    if resolved == "triton":
        torch.ops.sbp_kernels.append_to_pages(k, v, keys, values, layout.own_pages, layout.own_tokens)
    elif resolved == "torch":
        _append_plainly(keys, values, k, v, layout)
    else:
        raise ValueError("append_to_pages has no backend 'numba': use 'torch'")


def _append_plainly(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, layout: DecodeLayout) -> None:
    newest = (layout.own_tokens - 1).clamp(min=0).long()
    page_index, inside = newest // keys.shape[2], newest % keys.shape[2]
    pages = layout.own_pages.gather(1, page_index.unsqueeze(1)).squeeze(1).where(layout.own_tokens > 0, 0)
    write_to_pages(keys, values, k, v, pages, inside)


def write_to_pages(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, pages: Tensor, offsets: Tensor) -> None:
    """Write keys and values of any tokens, such as a seed's, in place.

    Args:
        keys: [pages, K, P, D], see `decode_attention`; numbers beyond the range of float8 become its largest.
        values: like keys.
        k: [T, K, D].
        v: like k.
        pages: int64 [T], of each token.
        offsets: int64 [T], of each token in its page.
    """
    for cache, new in (keys, k), (values, v):
        if cache.dtype == torch.float8_e4m3fn:  # which has few operations of its own
            largest = torch.finfo(cache.dtype).max
            new = new.clamp(-largest, largest).to(cache.dtype).view(torch.uint8)
            cache = cache.view(torch.uint8)
        cache[pages, :, offsets] = new.to(cache.dtype)


def _plain_attention(q: Tensor, keys: Tensor, values: Tensor, layout: DecodeLayout, scale: float) -> Tensor:
    """By torch's own operations, in float32 at least: every row's pages gathered, padded and masked."""
    live = layout.own_tokens > 0
    seed_tokens = layout.seed_tokens[layout.row_group].where(live, 0)
    visible = torch.cat(
        [
            _first(seed_tokens, layout.seed_pages.shape[1] * keys.shape[2]),
            _first(layout.own_tokens, layout.own_pages.shape[1] * keys.shape[2]),
        ],
        1,
    )
    pages = torch.cat([layout.seed_pages[layout.row_group], layout.own_pages], 1).where(visible[:, :: keys.shape[2]], 0)
    visible = visible.unsqueeze(1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (_gathered(cache, pages).to(q.dtype).to(dtype) for cache in (keys, values))
    grouped = q.unflatten(1, (k.shape[1], -1)).to(dtype)
    scores = (grouped @ k.mT * scale).masked_fill(~visible.unsqueeze(2), float("-inf"))
    weights = scores.softmax(-1).masked_fill(~live[:, None, None, None], 0)
    out = weights @ v.masked_fill(~visible.unsqueeze(-1), 0)  # what is not visible may be NaN
    return out.flatten(1, 2).to(q.dtype)


def _first(counts: Tensor, capacity: int) -> Tensor:
    """Mask, bool [B, capacity], True at the first `counts` [B] of each row."""
    return torch.arange(capacity, device=counts.device) < counts.unsqueeze(1)


def _gathered(cache: Tensor, pages: Tensor) -> Tensor:
    """[B, K, tokens, D] of the pages [B, any]."""
    storage = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
    return storage[pages].transpose(1, 2).flatten(2, 3).contiguous().view(cache.dtype)


def _fused_attention(q: Tensor, keys: Tensor, values: Tensor, layout: DecodeLayout, scale: float) -> Tensor:
    return torch.ops.sbp_kernels.decode_attention(q, keys, values, *layout.tensors, scale)


def _compiled_attention(q: Tensor, keys: Tensor, values: Tensor, layout: DecodeLayout, scale: float) -> Tensor:
    return import_module("sbp_kernels.decode.cpu").decode(q, keys, values, layout, scale)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, DecodeLayout, float], Tensor]] = {
    "triton": _fused_attention,
    "torch": _plain_attention,
    "numba": _compiled_attention,
}


def _resolved(backend: str, x: Tensor, keys: Tensor, values: Tensor) -> str:
    compilable = x.device.type == "cpu" and x.dtype == keys.dtype == torch.float32
    if backend == "auto":
        return "triton" if x.is_cuda else "numba" if compilable else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: use one of auto, {', '.join(BACKENDS)}")
    if backend == "numba" and not compilable:
        given = f"{x.dtype} beside {keys.dtype} on {x.device}"
        raise ValueError(f"backend 'numba' takes float32 tensors on the CPU, not {given}: use backend='torch'")
    if backend == "triton":
        _check_triton(x, keys, values)
    return backend


def _check_triton(x: Tensor, keys: Tensor, values: Tensor) -> None:
    check_device(x)
    if x.dtype not in QUERY_DTYPES or keys.dtype not in CACHE_DTYPES:
        given = f"{x.dtype} beside pages of {keys.dtype}"
        raise ValueError(f"the Triton kernels take bfloat16, float16 and float32, not {given}: use backend='torch'")
    if keys.shape[2] not in PAGE_TOKENS or keys.shape[3] > 256:
        given = f"{keys.shape[2]} tokens of width {keys.shape[3]}"
        raise ValueError(f"the Triton kernels take pages of {PAGE_TOKENS} tokens up to 256 wide, not {given}")
    if keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError("the D numbers of a key or value must be side by side in memory: make the pages contiguous")
    if keys.dtype == torch.float8_e4m3fn and x.is_cuda and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < (8, 9):
            given = ".".join(map(str, capability))
            raise ValueError(f"pages of float8 need compute capability 8.9, this device has {given}: keep them in bfloat16")


def _check(x: Tensor, keys: Tensor, values: Tensor, layout: DecodeLayout, name: str) -> None:
    """Check that the queries, or the new keys, agree with the pages and the layout."""
    if x.dim() != 3 or keys.dim() != 4 or (values.shape, values.dtype, values.device) != (keys.shape, keys.dtype, keys.device):
        given = f"{tuple(x.shape)}, {tuple(keys.shape)}, {tuple(values.shape)}"
        raise ValueError(f"{name} must be [B, heads, D], keys and values [pages, heads, tokens, D], alike: got {given}")
    if x.shape[2] != keys.shape[3] or len(x) != len(layout.own_tokens):
        given = f"{len(x)} rows of width {x.shape[2]} beside {keys.shape[3]} and a layout of {len(layout.own_tokens)}"
        raise ValueError(f"{name}, keys and layout must agree in rows and width: got {given}")
    if not x.device == keys.device == layout.own_tokens.device:
        given = f"{x.device}, {keys.device}, {layout.own_tokens.device}"
        raise ValueError(f"{name}, keys and layout must be on one device: got {given}")


def _fake_decode(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def _fake_append(*_: object) -> None:
    return None


register_operation(
    "decode_attention(Tensor q, Tensor keys, Tensor values, Tensor seed_pages, Tensor seed_tokens, Tensor group_rows, "
    "Tensor row_group, Tensor own_pages, Tensor own_tokens, float scale) -> Tensor",
    "decode.triton.attention",
    _fake_decode,
)
register_operation(
    "append_to_pages(Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor own_pages, Tensor own_tokens) -> ()",
    "decode.triton.append",
    _fake_append,
)
