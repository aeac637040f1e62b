"""Output projection and cross-entropy, forward and backward, where half or all of the rows carry loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import product

import torch
import torch.nn.functional as F
from sbp_kernels import linear_cross_entropy
from sbp_kernels.linear_cross_entropy import loss_rows_of, reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import machine
from bench.case import Case, Prepared, Provider, Tensors

Loss = Callable[..., Tensor]  # hidden, weight, targets, rows that carry loss -> scalar
CHUNKS = 8
SLAB_ROWS = (2048, 8192)  # beside the default of 4,096: larger slabs add to the weight's gradient in fewer passes
CHECKED_ROWS = 512
IGNORED = -100


def loss() -> Iterator[Case]:
    """The widths and vocabularies of real models; on a CPU one small shape."""
    if torch.cuda.is_available():
        shapes = [(16384, 4096, 131072), (16384, 3072, 49152), (16384, 2048, 49152), (16384, 2048, 131072)]
    else:
        shapes = [(4096, 128, 4096)]
    if machine.tiny():
        shapes = [(64, 16, 50)]
    for (rows, width, vocabulary), share in product(shapes, (0.5, 1.0)):
        yield _case(rows, width, vocabulary, share)


def _case(rows: int, width: int, vocabulary: int, share: float, small: bool = False) -> Case:
    device = machine.device()
    with_loss = int(rows * share)
    on_host = torch.arange(rows) % rows < with_loss
    loss_rows = loss_rows_of(torch.where(on_host, 0, IGNORED), with_loss).to(device)
    carrying = on_host.to(device)

    def inputs(generator: torch.Generator) -> Tensors:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        hidden = torch.randn(rows, width, device=device, dtype=dtype, generator=generator)
        weight = torch.randn(vocabulary, width, device=device, dtype=dtype, generator=generator) * width**-0.5
        targets = torch.randint(0, vocabulary, (rows,), device=device, generator=generator)
        return {"hidden": hidden, "weight": weight, "targets": targets.where(carrying, IGNORED), "loss_rows": loss_rows}

    def exact(tensors: Tensors) -> Tensors:
        double = {**tensors, "hidden": tensors["hidden"].double(), "weight": tensors["weight"].double()}
        return _provider(lambda hidden, weight, targets, _: reference.linear_cross_entropy(hidden, weight, targets))(
            double
        ).run()

    logits = torch.finfo(torch.bfloat16).bits / 8 * rows * vocabulary
    fits = small or not torch.cuda.is_available() or logits < 5e9
    providers = {name: _provider(function) for name, function in _functions().items() if fits or name not in WHOLE}
    return Case(
        {"rows": rows, "with loss": share, "width": width, "vocabulary": vocabulary},
        inputs,
        providers,
        exact,
        work=float(with_loss),
        unit="loss tokens",
        flops=6.0 * with_loss * width * vocabulary,
        baselines=("full logits",),
        check=None if rows <= CHECKED_ROWS else _case(CHECKED_ROWS, width, vocabulary, share, small=True),
    )


def _functions() -> dict[str, Loss]:
    functions: dict[str, Loss] = {"ours, slab": _ours("slab"), "ours, recompute": _ours("recompute"), "full logits": _full}
    if torch.cuda.is_available():
        functions |= {f"ours, slab of {rows} rows": _ours("slab", rows) for rows in SLAB_ROWS}
        functions["full logits, compiled"] = torch.compile(_full)
        functions["chunks, compiled"] = torch.compile(_chunked)
    functions |= {"Liger": _liger, "Liger, rows compacted": _compacted(_liger)}
    functions |= {"cut-cross-entropy, exact": _cut, "torch's own": _own}
    return functions


WHOLE = ("full logits", "full logits, compiled")  # left out where they would need most of a device's memory


def _ours(mode: str, slab_rows: int | None = None) -> Loss:
    return lambda hidden, weight, targets, rows: linear_cross_entropy(
        hidden, weight, targets, loss_rows=rows, mode=mode, slab_rows=slab_rows
    )


def _full(hidden: Tensor, weight: Tensor, targets: Tensor, _: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=IGNORED, reduction="sum")


def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    parts = zip(hidden.chunk(CHUNKS), targets.chunk(CHUNKS), strict=True)
    losses = [checkpoint(_full, part, weight, goals, rows, use_reentrant=False) for part, goals in parts]
    return torch.stack(losses).sum()


def _compacted(function: Loss) -> Loss:
    """Call the function as a careful user would: on the rows that carry loss alone."""
    return lambda hidden, weight, targets, rows: function(hidden[rows], weight, targets[rows], rows)


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor, _: Tensor) -> Tensor:
    _needs_cuda(hidden)
    library = import_module("liger_kernel.transformers.functional")
    return library.liger_fused_linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORED, reduction="sum")


def _cut(hidden: Tensor, weight: Tensor, targets: Tensor, _: Tensor) -> Tensor:
    _needs_cuda(hidden)
    library = import_module("cut_cross_entropy")
    options = {"ignore_index": IGNORED, "reduction": "sum", "filter_eps": None}
    return library.linear_cross_entropy(hidden, weight, targets, impl="cce", **options)


def _own(hidden: Tensor, weight: Tensor, targets: Tensor, _: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise ValueError("this release of torch has no linear_cross_entropy")
    return F.linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORED, reduction="sum")


def _needs_cuda(x: Tensor) -> None:
    if not x.is_cuda:
        raise ValueError("needs CUDA")


def _provider(function: Loss) -> Provider:
    def provider(tensors: Tensors) -> Prepared:
        leaves = [tensors[name].detach().requires_grad_() for name in ("hidden", "weight")]

        def run() -> Tensors:
            value = function(*leaves, tensors["targets"], tensors["loss_rows"])
            hidden, weight = torch.autograd.grad(value, leaves)
            return {"loss": value.detach(), "dhidden": hidden, "dweight": weight}

        return Prepared(run)

    return provider
