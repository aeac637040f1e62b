"""Third-party backends of `packed_attention`: the attention of torch and of other libraries.

`sdpa` and `flex` express every mask of a layout. `varlen`, `flash-attn` and `xformers` express only documents, so they take
layouts in which no two partners share a seed; a pair is one document to them. All but `flex` give None for the
log-sum-exp: theirs, where they have one, has no gradient.

What a backend makes of a layout (a mask, the ends of documents) is made once for each layout and shared by all layers. It
is looked up outside of graphs: `torch.compile` breaks its graph here, and `fullgraph=True` is refused.

The gradients of `varlen`, `flash-attn` and `xformers` may differ from run to run: they are added atomically, in the first
two unless `torch.use_deterministic_algorithms` asks otherwise.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from sbp_kernels.attention.registry import register_attention_backend
from sbp_kernels.layout import PackedLayout
from sbp_kernels.layout.blocks import is_visible

Made = TypeVar("Made")
HALF = (torch.bfloat16, torch.float16)
BLOCK = 128  # tokens of a block of FlexAttention's mask, its default
LIBRARIES = {
    "varlen": ("torch.nn.attention.varlen", "varlen_attn"),
    "flash-attn": ("flash_attn", "flash_attn_varlen_func"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
    "flash-attn-4": ("flash_attn.cute", "flash_attn_func"),
}


class Documents(NamedTuple):
    """Arguments of kernels for documents of varying length.

    Attributes:
        lengths: tokens of each document; None where they were never on the host.
        cu_seqlens: int32 [documents + 1], 0 and the end of each, on the layout's device.
        longest: tokens of the longest document, or more.
    """

    lengths: list[int] | None
    cu_seqlens: Tensor
    longest: int


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool
) -> tuple[Tensor, None]:
    """PyTorch's `scaled_dot_product_attention` over the whole packed sequence, on any device.

    More than one document takes a mask of T * T bytes, and on CUDA a bias of T * T elements a call: for
    short sequences. So do documents whose lengths are known only on the device.
    """
    mask = _dense_mask(layout)
    shared = q.shape[1] != k.shape[1]
    if mask is not None and shared:  # under a mask no fused kernel shares heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q, k, v = (_heads_first(x) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=mask is None and shared)
    return out[0].transpose(0, 1), None


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """PyTorch's FlexAttention (Dong et al. 2024): on CUDA compiled, once for each shape; elsewhere unfused, forward only."""
    check_tokens("flex", layout)
    tensors = [_heads_first(x) for x in (q, k, v)]
    attention: Callable[..., Any] = flex.flex_attention
    if q.device.type == "cuda":
        if q.dtype not in (*HALF, torch.float32) or q.shape[2] < 16:
            given = f"q is {q.dtype} with heads of width {q.shape[2]}"
            raise ValueError(f"{given}: on CUDA backend 'flex' takes bfloat16, float16 and float32, and widths from 16")
        attention = _compiled_flex_attention()
    elif torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(f"backend 'flex' has no gradients on {q.device.type}: use backend 'torch' or 'sdpa'")
    else:
        tensors = [x.detach() for x in tensors]
    wanted = flex.AuxRequest(lse=return_lse)
    shared = q.shape[1] != k.shape[1]
    out, auxiliary = attention(*tensors, block_mask=_block_mask(layout), scale=scale, enable_gqa=shared, return_aux=wanted)
    return out[0].transpose(0, 1), auxiliary.lse[0] if return_lse else None


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool
) -> tuple[Tensor, None]:
    """PyTorch's `varlen_attn`: by default FlashAttention-2 (Dao 2023). For documents only.

    Where the lengths are known only on the device, T stands for the longest, which starts many programs without work.
    """
    attention = find_library("varlen", q.device)
    _, ends, longest = _documents_for("varlen", q, layout, HALF)
    # torch 2.11 shares heads without being told to
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(attention).parameters else {}
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    return attention(q, k, v, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), **gqa), None


def flash_attn_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool
) -> tuple[Tensor, None]:
    """The library flash-attn: FlashAttention-3 (Shah et al. 2024) on Hopper where it is installed, else FlashAttention-2.

    For documents only. Lengths that are known only on the device have the cost described in `varlen_attention`.
    """
    attention = find_library("flash-attn", q.device)
    _, ends, longest = _documents_for("flash-attn", q, layout, HALF)
    options = {"softmax_scale": scale, "causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    out = attention(q, k, v, ends, ends, longest, longest, **options)
    return out[0] if isinstance(out, tuple) else out, None  # early FlashAttention-3 returned the log-sum-exp as well


def xformers_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool
) -> tuple[Tensor, None]:
    """The `memory_efficient_attention` of xformers, by the kernel that it chooses. For documents only.

    Its backward does not share heads: where gradients are needed, k and v are repeated for each query head.
    """
    attention = find_library("xformers", q.device)
    _documents_for("xformers", q, layout, (*HALF, torch.float32))
    mask = _block_diagonal(layout)
    group = q.shape[1] // k.shape[1]
    queries, k, v = (_rows_contiguous(x).unsqueeze(0) for x in (q, k, v))
    if group > 1 and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    elif group > 1:
        queries = queries.unflatten(2, (-1, group))  # [1, T, Hkv, group, D]
        k, v = (x.unsqueeze(3).expand(queries.shape) for x in (k, v))
    return attention(queries, k, v, attn_bias=mask, scale=scale).reshape(q.shape), None


@functools.cache
def find_library(backend: str, device: torch.device) -> Callable[..., Any]:
    """Return the function of the library behind `backend`, one of LIBRARIES.

    Raises:
        ValueError: it cannot run on `device`, or is not installed.
    """
    if device.type != "cuda":
        raise ValueError(f"backend {backend!r} needs CUDA tensors, these are on {device.type}: use backend 'torch' or 'sdpa'")
    generation, _ = torch.cuda.get_device_capability(device)
    if generation < 8:
        raise ValueError(f"backend {backend!r} needs a GPU of the Ampere generation or newer: use backend 'sdpa'")
    module, name = LIBRARIES[backend]
    if backend == "flash-attn" and generation == 9 and importlib.util.find_spec("flash_attn_interface"):
        module = "flash_attn_interface"  # FlashAttention-3
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as problem:
        raise ValueError(f"backend {backend!r} lacks {module}.{name} ({problem}): install it or use 'triton'") from problem


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """FlexAttention compiled as one graph; past torch's limit of recompilations it raises rather than running unfused."""
    return torch.compile(flex.flex_attention, fullgraph=True, dynamic=False)


def _documents_for(backend: str, q: Tensor, layout: PackedLayout, dtypes: tuple[torch.dtype, ...]) -> Documents:
    """The documents of the layout, after checks that `backend` takes them and q."""
    check_tokens(backend, layout)
    if q.dtype not in dtypes:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"q is {q.dtype}: backend {backend!r} takes {names}")
    if q.shape[2] % 8 or not 8 <= q.shape[2] <= 256:
        raise ValueError(f"q has heads of width {q.shape[2]}: backend {backend!r} takes multiples of 8 up to 256")
    documents = _documents(layout)
    if documents is None:
        raise ValueError(
            f"backend {backend!r} cannot express partners that share a seed: use 'triton', 'flex' or repeat the seed"
        )
    return documents


def check_tokens(backend: str, layout: PackedLayout) -> None:
    """Raise ValueError where the layout has no tokens."""
    if len(layout) == 0:
        raise ValueError(f"layout has no tokens: backend {backend!r} takes one or more")


def once_per_layout(make: Callable[[PackedLayout], Made]) -> Callable[[PackedLayout], Made]:
    """`make`, called once for each layout; what it returns must not hold the layout, or neither is ever freed."""
    made: WeakKeyDictionary[PackedLayout, Made] = WeakKeyDictionary()

    def look_up(layout: PackedLayout) -> Made:
        if layout not in made:
            made[layout] = make(layout)
        return made[layout]

    @functools.wraps(make)
    def outside_of_graphs(layout: PackedLayout) -> Made:
        # not as a decorator: that would import the compiler with this module, which takes seconds
        return torch.compiler.disable(look_up)(layout) if torch.compiler.is_compiling() else look_up(layout)

    return outside_of_graphs


@once_per_layout
def _documents(layout: PackedLayout) -> Documents | None:
    """The documents that the mask consists of: chains of segments, each the parent of the next. None where it branches."""
    if layout.lengths is None or layout.parents is None:
        assert layout.cu_seqlens is not None
        return Documents(None, layout.cu_seqlens, len(layout))
    if any(parent not in (-1, segment - 1) for segment, parent in enumerate(layout.parents)):
        return None
    roots = [segment for segment, parent in enumerate(layout.parents) if parent == -1]
    ends = np.cumsum([0, *layout.lengths])[[*roots, -1]]
    lengths = np.diff(ends).tolist()
    device = layout.positions.device
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return Documents(lengths, cu_seqlens, max(lengths, default=0))


@once_per_layout
def _dense_mask(layout: PackedLayout) -> Tensor | None:
    """Mask, bool [T, T], True where query i (row) sees key j (column); None where the whole sequence is one document."""
    documents = _documents(layout)
    if documents is not None and documents.lengths == [len(layout)]:
        return None
    token = torch.arange(len(layout), device=layout.positions.device)
    return is_visible(token[:, None], token, layout.visible_until)


@once_per_layout
def _block_mask(layout: PackedLayout) -> flex.BlockMask:
    """FlexAttention's mask in O(T + blocks^2), without [T, T] elements.

    An earlier block of keys is seen where one of its `visible_until` passes the beginning of the queries, and needs no
    mask where all of them reach their end. A block meets itself under the mask.
    """
    until, tokens = layout.visible_until, len(layout)
    blocks = F.pad(until, (0, -tokens % BLOCK)).view(-1, BLOCK)
    block = torch.arange(len(blocks), device=until.device)
    begin, earlier = block[:, None] * BLOCK, block < block[:, None]  # [query blocks, key blocks]
    whole = earlier & (blocks.amin(1) >= begin + BLOCK)
    partial = (earlier & (blocks.amax(1) > begin) & ~whole) | (block == block[:, None])
    partial_count, partial_keys, whole_count, whole_keys = (
        x.int()[None, None]
        for met in (partial.int(), whole.int())
        for x in (met.sum(1), met.argsort(dim=1, descending=True, stable=True))
    )

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_visible(query, key, until[key])

    return flex.BlockMask.from_kv_blocks(
        partial_count, partial_keys, whole_count, whole_keys, BLOCK, visible, seq_lengths=(tokens, tokens)
    )


@once_per_layout
def _block_diagonal(layout: PackedLayout) -> Any:
    """The mask of xformers."""
    documents = _documents(layout)
    if documents is None or documents.lengths is None:
        raise ValueError("backend 'xformers' needs the lengths on the host: make the layout from them or use 'varlen'")
    masks = importlib.import_module("xformers.ops.fmha.attn_bias")
    return masks.BlockDiagonalCausalMask.from_seqlens(documents.lengths, device=layout.positions.device)


def _heads_first(x: Tensor) -> Tensor:
    """[T, H, D] as [1, H, T, D]."""
    return x.transpose(0, 1).unsqueeze(0)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


register_attention_backend("sdpa", sdpa_attention, operations=["aten::_scaled_dot_product_"])
register_attention_backend("flex", flex_attention, operations=["flex_attention"])
register_attention_backend(
    "varlen",
    varlen_attention,
    operations=["torch_attn::_varlen_attn"],
    check_device=lambda device: find_library("varlen", device),
)
register_attention_backend(
    "flash-attn",
    flash_attn_attention,
    operations=["flash_attn"],  # the names of its versions' namespaces begin so
    check_device=lambda device: find_library("flash-attn", device),
)
register_attention_backend(
    "xformers",
    xformers_attention,
    operations=["xformers", "aten::_efficient_attention", "aten::_flash_attention"],  # its own, or those that torch ships
    check_device=lambda device: find_library("xformers", device),
)
