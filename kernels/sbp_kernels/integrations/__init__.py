"""The package inside other training stacks. Each of them is imported only by the calls that need it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sbp_kernels.layout import PackedLayout

# tensor -> (what else its layout was made of, the layout); an entry goes when its tensor does
_LAYOUTS = WeakTensorKeyDictionary()


def cached_by_tensor(build: Callable[..., PackedLayout]) -> Callable[..., PackedLayout]:
    """Cache `build`, whose first argument is a tensor, for each tensor object and version of its content.

    All layers of a model get the same tensor, so they share one layout. A tensor that was written to is built from again,
    except where PyTorch does not count writes: in a tensor made under `torch.inference_mode`. While a CUDA graph is captured
    each call builds: the graph must make its layout of what the tensor holds at each replay, in memory of its own.
    """

    @torch.compiler.disable
    @wraps(build)
    def built(tensor: Tensor, *rest: object) -> PackedLayout:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return build(tensor, *rest)
        version = None if tensor.is_inference() else tensor._version
        made_of = (build, version, rest)
        if tensor not in _LAYOUTS or _LAYOUTS[tensor][0] != made_of:
            _LAYOUTS[tensor] = made_of, build(tensor, *rest)
        layout: PackedLayout = _LAYOUTS[tensor][1]
        return layout

    return built


@cached_by_tensor
def layout_of_documents(cu_seqlens: Tensor, tokens: int) -> PackedLayout:
    """`PackedLayout.from_cu_seqlens`, built once for all layers given the same tensor, without host-device synchronisation."""
    return PackedLayout.from_cu_seqlens(cu_seqlens, tokens=tokens)
