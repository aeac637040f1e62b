"""FlashAttention-4 (the package flash-attn-4) as the engine of every mask of a layout, on Hopper and Blackwell.

It walks the lists of `layout.blocks`, which are made on the host once for each layout and shared by all layers, and
evaluates `is_visible` in the blocks that hold visible pairs and others. It breaks the graphs of `torch.compile`, and
selective activation checkpointing computes it again. Its first calls for heads of a width compile it for half a minute.

It adds the gradients of queries in any order, so they may differ from run to run, and it has no other way on Hopper: where
`torch.use_deterministic_algorithms` asks for equal bits, gradients are refused.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from sbp_kernels.attention.registry import register_attention_backend
from sbp_kernels.attention.third_party import HALF, check_tokens, find_library, once_per_layout
from sbp_kernels.layout import PackedLayout
from sbp_kernels.layout.blocks import is_visible, list_blocks
from sbp_kernels.layout.packed_layout import move_in_one_copy

NAME = "flash-attn-4"
OLDEST = "4.0.0b36"  # until August 2026 its gradients could be wrong: its issue 2424 and pull request 2756
BLOCKS = {9: (128, 128), 10: (256, 128)}  # GPU generation -> queries and keys of a block: multiples of its kernels' tiles
# Heads of 64 had wrong gradients on an H200 (its issue 2623); tiles for wider heads do not divide these blocks.
WIDTHS = range(72, 129, 8)


def flash_attn_4_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """FlashAttention-4 over the whole packed sequence, for every mask; out, and lse with its gradient where wanted."""
    check_tokens(NAME, layout)
    if q.dtype not in HALF:
        raise ValueError(f"q is {q.dtype}: backend {NAME!r} takes bfloat16 and float16")
    if q.shape[2] not in WIDTHS:
        taken = f"takes multiples of {WIDTHS.step} from {WIDTHS[0]} to {WIDTHS[-1]}"
        raise ValueError(f"q has heads of width {q.shape[2]}: backend {NAME!r} {taken}")
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if differentiated and torch.are_deterministic_algorithms_enabled():
        raise ValueError(f"the gradients of backend {NAME!r} are not deterministic, but torch is asked for it: use 'triton'")
    # not as a decorator: that would import the compiler with this module, which takes seconds
    attend = torch.compiler.disable(_attend) if torch.compiler.is_compiling() else _attend
    return attend(q, k, v, layout, scale, return_lse)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    with torch.cuda.device_of(q):  # it launches on the current device
        out, lse = find_flash_attn_4(q.device)(
            *(x.unsqueeze(0) for x in (q, k, v)),
            softmax_scale=scale,
            mask_mod=tree_mask(),
            aux_tensors=[layout.visible_until],
            **_lists_of(layout),
            return_lse=return_lse,
        )
    return out.squeeze(0), lse.squeeze(0) if return_lse else None


@functools.cache
def find_flash_attn_4(device: torch.device) -> Callable[..., Any]:
    """Return the library's `flash_attn_func`.

    Raises:
        ValueError: it cannot run on `device`, is not installed or is too old.
    """
    attention = find_library(NAME, device)
    generation, minor = torch.cuda.get_device_capability(device)
    if generation not in BLOCKS:
        given = f"this one has compute capability {generation}.{minor}"
        raise ValueError(f"backend {NAME!r} needs a GPU of compute capability 9.0 or 10.x, {given}: use 'triton'")
    installed = TorchVersion(version("flash-attn-4"))
    if installed < OLDEST:
        raise ValueError(f"backend {NAME!r} needs flash-attn-4 {OLDEST} or newer: {installed} may give wrong gradients")
    return attention


@functools.cache
def tree_mask() -> Any:
    """`is_visible` as a `mask_mod` of FlashAttention-4, which reads `visible_until` as its only auxiliary tensor."""
    # modules and not what they hold: the library's cache on disk looks enclosed values up by their `repr`
    cutlass = importlib.import_module("cutlass")
    cute = importlib.import_module("cutlass.cute")
    utils = importlib.import_module("flash_attn.cute.utils")

    @cute.jit
    def visible(batch, head, query, key, lengths, tensors):  # type: ignore[no-untyped-def]
        until = utils.scalar_to_ssa(tensors[0][key[0]], cutlass.Int32)
        return is_visible(query, key, until)

    return visible


@once_per_layout
def _lists_of(layout: PackedLayout) -> dict[str, Any]:
    if layout.lengths is None or layout.parents is None:
        raise ValueError(f"backend {NAME!r} needs the lengths on the host: make the layout from them or use 'triton'")
    device = layout.positions.device
    sizes = BLOCKS[torch.cuda.get_device_capability(device)[0]]
    on_host = PackedLayout.from_tree(layout.lengths, layout.parents)
    by_query, by_key = list_blocks(on_host.visible_until.numpy(), *sizes)
    return block_sparsity(move_in_one_copy([*by_query, *by_key], device), sizes)


def block_sparsity(lists: Sequence[Tensor], sizes: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments of `flash_attn_func` that list the blocks, the same for all heads.

    Args:
        lists: the fields of both BlockLists of `list_blocks`, in order.
        sizes: queries and keys of a block.
    """
    make = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    by_query, by_key = ([x.view(1, 1, *x.shape) for x in side] for side in (lists[:4], lists[4:]))
    return {
        "block_sparse_tensors": make(*by_query, block_size=sizes),
        "block_sparse_tensors_bwd": make(*by_key, block_size=sizes),
    }


# without operations of PyTorch: its kernels are called directly
register_attention_backend(NAME, flash_attn_4_attention, check_device=find_flash_attn_4)
