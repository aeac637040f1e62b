"""`packed_attention` with the signature of flash-attn's function for documents of varying length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdRef

from sbp_kernels.attention import packed_attention
from sbp_kernels.integrations import cached_by_tensor, layout_of_documents
from sbp_kernels.layout import PackedLayout


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Causal attention within packed documents, in place of `flash_attn.flash_attn_varlen_func`.

    The layout is made once for all calls with the same tensor `cu_seqlens_q`. Give the same tensor as `cu_seqlens_k`: two
    tensors are compared once, which waits for their device.

    Args:
        q: [T, Hq, D].
        k: [T, Hkv, D]; Hq is a multiple of Hkv.
        v: [T, Hkv, D].
        cu_seqlens_q: int32 [documents + 1], 0 and the end of each document, on the device of q.
        cu_seqlens_k: equal to `cu_seqlens_q`.
        max_seqlen_q: not needed; must equal `max_seqlen_k`.
        max_seqlen_k: not needed.
        dropout_p: must be 0.
        softmax_scale: factor of the scores, positive; D ** -0.5 by default.
        causal: must be True, which is not the default.
        window_size: must be (-1, -1), or (-1, 0), which is causal attention.
        softcap: must be 0.
        alibi_slopes: must be None.
        deterministic: of no effect: the gradients of the backends that "auto" takes are the same bits on every run.
        return_attn_probs: also return the log-sum-exp, and None for the probabilities, which never exist.
        block_table: must be None.
        backend: of `packed_attention`.

    Returns:
        out [T, Hq, D] in the dtype of q; with `return_attn_probs` (out, lse [Hq, T] in float32, None).

    Raises:
        ValueError: naming the argument that is not supported, or does not fit.
    """
    refused = {
        "dropout_p": dropout_p != 0,
        "causal=False": not causal,
        "window_size": tuple(window_size) not in ((-1, -1), (-1, 0)),
        "softcap": softcap != 0,
        "alibi_slopes": alibi_slopes is not None,
        "block_table": block_table is not None,
    }
    if present := [name for name, given in refused.items() if given]:
        raise ValueError(f"packed attention does not support {', '.join(present)}: leave it out, or call flash-attn")
    if len(q) != len(k) or max_seqlen_q != max_seqlen_k or cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be equal: packed attention has a key for each query")
    if cu_seqlens_k is cu_seqlens_q:
        layout = layout_of_documents(cu_seqlens_q, len(q))
    else:
        version = None if cu_seqlens_k.is_inference() else cu_seqlens_k._version
        layout = _layout_of_equal(cu_seqlens_q, WeakIdRef(cu_seqlens_k), version, len(q))
    if not return_attn_probs:
        return packed_attention(q, k, v, layout, softmax_scale=softmax_scale, backend=backend)
    out, lse = packed_attention(q, k, v, layout, softmax_scale=softmax_scale, backend=backend, return_lse=True)
    return out, lse, None


@cached_by_tensor
def _layout_of_equal(cu_seqlens_q: Tensor, cu_seqlens_k: WeakIdRef, _version: int | None, tokens: int) -> PackedLayout:
    """The layout of documents whose ends are given twice, after a comparison."""
    if not torch.equal(cu_seqlens_q, cu_seqlens_k()):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be equal: packed attention has a key for each query")
    return PackedLayout.from_cu_seqlens(cu_seqlens_q, tokens=tokens)
