"""What is measured: each operation with its cases, and the ways to compute each case side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sbp_kernels import PackedLayout, linear_cross_entropy, packed_attention, reference
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One shape of one operation.

    Attributes:
        shape: what a reader needs to know of it.
        providers: name -> call giving named results; the first is ours.
        exact: the same results in float64, for the correctness check; providers that do not share the layout of the
            results name fewer of them.
        work: units of useful work in one call (loss tokens, visible pairs), for rates.
        unit: of the work.
    """

    shape: dict[str, Any]
    providers: Mapping[str, Callable[[], Tensors]]
    exact: Callable[[], Tensors]
    work: float
    unit: str


def attention() -> Iterator[Case]:
    """Forward and backward over documents, and over seeds with their partners."""
    torch.manual_seed(0)
    for name, tree in {"documents": [(256, 0, 0)] * 16, "8 partners a seed": [(256, 224, 8)] * 2}.items():
        lengths, parents = _forest(tree)
        layout = PackedLayout.from_tree(lengths, parents)
        q, k, v = (torch.randn(len(layout), heads, 64, requires_grad=True) for heads in (4, 2, 2))
        mask = reference.dense_mask(layout)

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, layout: PackedLayout = layout) -> Tensors:
            return _with_gradients(packed_attention(q, k, v, layout), {"q": q, "k": k, "v": v})

        def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Tensor = mask) -> Tensors:
            q_, k_, v_ = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, enable_gqa=True)
            return _with_gradients(out.squeeze(0).transpose(0, 1), {"q": q, "k": k, "v": v})

        def exact(q: Tensor = q, k: Tensor = k, v: Tensor = v, layout: PackedLayout = layout) -> Tensors:
            q_, k_, v_ = (x.detach().double().requires_grad_() for x in (q, k, v))
            return _with_gradients(reference.packed_attention(q_, k_, v_, layout), {"q": q_, "k": k_, "v": v_})

        shape = {"stream": name, "tokens": len(layout), "heads": "4:2", "width": 64}
        yield Case(shape, {"segments": ours, "dense mask": dense}, exact, layout.visible_pairs(), "visible pairs")


def loss() -> Iterator[Case]:
    """Output projection and cross-entropy, forward and backward, with half and with all of the rows carrying loss."""
    torch.manual_seed(0)
    for share in (0.5, 1.0):
        hidden, weight = torch.randn(4096, 128), torch.randn(4096, 128) / 8
        hidden.requires_grad_()
        weight.requires_grad_()
        targets = torch.randint(0, 4096, (4096,))
        targets[torch.rand(4096) >= share] = -100
        leaves = {"hidden": hidden, "weight": weight}

        def ours(leaves: Tensors = leaves, targets: Tensor = targets) -> Tensors:
            return _with_gradients(linear_cross_entropy(leaves["hidden"], leaves["weight"], targets), leaves)

        def full_logits(leaves: Tensors = leaves, targets: Tensor = targets) -> Tensors:
            logits = leaves["hidden"] @ leaves["weight"].T
            return _with_gradients(F.cross_entropy(logits, targets, reduction="sum"), leaves)

        def exact(leaves: Tensors = leaves, targets: Tensor = targets) -> Tensors:
            double = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
            loss = reference.linear_cross_entropy(double["hidden"], double["weight"], targets)
            return _with_gradients(loss, double)

        shape = {"rows": 4096, "rows with loss": share, "width": 128, "vocabulary": 4096}
        providers = {"slabs, rows with loss": ours, "full logits": full_logits}
        yield Case(shape, providers, exact, float((targets >= 0).sum()), "loss tokens")


OPERATIONS: dict[str, Callable[[], Iterator[Case]]] = {"attention": attention, "loss": loss}


def _with_gradients(out: Tensor, leaves: Tensors) -> Tensors:
    gradients = torch.autograd.grad(out.float().square().sum() if out.dim() else out, list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def _forest(trees: list[tuple[int, int, int]]) -> tuple[list[int], list[int]]:
    """Lengths and parents of trees given as (seed length, partner length, partners)."""
    lengths: list[int] = []
    parents: list[int] = []
    for seed, partner, partners in trees:
        root = len(lengths)
        lengths += [seed] + [partner] * partners
        parents += [-1] + [root] * partners
    return lengths, parents
