"""What a forward that nobody has measured must show on a GPU before its first use there: the same bits, many times over.

Kernels in which one group of warps copies what others multiply are known to race, where a copy overwrites a tile that a product
still reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from sbp_kernels._tuned import unlisted
from sbp_kernels.attention import launch as plain
from sbp_kernels.layout import PackedLayout, Tiles

REPEATS = 1000
AGREEMENT = 0.02  # relative, root mean square, between results that were rounded to 16 bits
CHECKED_TREE = ([1500, 300, 700, 40, 900, 656], [-1, 0, 0, -1, -1, 4])
CHECKED_HEADS = (64, 8, 8)  # of q, k and v
# (q, k, v, visible_until, query_tiles, query_runs, scale, rows of a tile, keys of a step) -> out, lse in base 2
Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, int, int], tuple[Tensor, Tensor]]
Form = tuple[torch.device, int, torch.dtype, int, int]  # device, width of heads, dtype, rows of a tile, keys of a step
# backend and form -> what the check found, None where it passed
_FAULTS: dict[tuple[str, Form], str | None] = {}


def check(backend: str, forward: Forward, form: Form, release: str = "") -> None:
    """Check one form of a kernel on its device, once a process; `release` begins the version of Triton that it needs, if any.

    Raises:
        ValueError: the kernel cannot run there, failed its check, or cannot be checked now.
    """
    device = form[0]
    if torch.cuda.get_device_capability(device) != (9, 0) or not triton.__version__.startswith(release):
        needs = f"a Hopper GPU and triton {release}" if release else "a Hopper GPU"
        raise ValueError(f"backend {backend!r} needs {needs}: use backend 'triton'")
    if (backend, form) not in _FAULTS:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(f"backend {backend!r} is unchecked on this GPU: call it once before a CUDA graph is captured")
        _FAULTS[backend, form] = find_fault(forward, form)
    if fault := _FAULTS[backend, form]:
        raise ValueError(f"backend {backend!r} failed its self-check on {device}: {fault}: use backend 'triton'")


def find_fault(forward: Forward, form: Form, repeats: int = REPEATS) -> str | None:
    """Return how a kernel's results differ from run to run or from those of the plain kernel; None where they do not."""
    device, head_width, dtype, rows, step = form
    sizes = (rows, step, rows, step)
    layout = PackedLayout.from_tree(*CHECKED_TREE, tiles=Tiles(*sizes)).planned().to(device)
    assert layout.plan is not None
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(len(layout), heads, head_width, device=device, generator=generator).to(dtype) for heads in CHECKED_HEADS
    )
    arguments = q, k, v, layout.visible_until, layout.plan.query_tiles, layout.plan.query_runs, head_width**-0.5
    first = forward(*arguments, rows, step)
    different = torch.zeros((), dtype=torch.bool, device=device)
    for _ in range(repeats):
        for again, result in zip(forward(*arguments, rows, step), first, strict=True):
            different |= (again != result).any()
    right = plain.forward(*arguments, unlisted(head_width, dtype, sizes))
    pairs = [(mine.float(), theirs.float()) for mine, theirs in zip(first, right, strict=True)]
    errors = [float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs]
    if bool(different):
        return f"its results differ within {repeats} repeats"
    return None if max(errors) <= AGREEMENT else f"its results differ from the plain kernel's by {max(errors):.2g}"
