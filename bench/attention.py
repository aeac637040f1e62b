"""Attention over documents and over shared seeds, beside every other backend that can compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from sbp_kernels import PackedLayout, packed_attention
from sbp_kernels.attention import reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import machine
from bench.case import Case, Prepared, Provider, Tensors
from bench.length_distributions import LENGTH_DISTRIBUTIONS, PARTNER_COUNTS, SegmentTree, documents, shared_seeds

Attend = Callable[..., Tensor]  # q, k, v, layout -> output
PASSES = ("forward", "backward", "both")
PRODUCTS = {"forward": 2, "backward": 5, "both": 7}  # matrix products of the definition, as FlashAttention counts them
THIRD_PARTY_BACKENDS = ("flex", "varlen", "xformers", "flash-attn")
CHECKED_TOKENS = 1024  # the definition in float64 holds a score for every pair and head


@dataclass(frozen=True)
class PackedSequence:
    """A packed sequence, and the same documents for kernels that must repeat a seed for each of its partners.

    Attributes:
        layout: of T tokens.
        scored: int64 [S], the rows whose output carries loss.
        repeated: layout of the R tokens with seeds repeated.
        index: int64 [R], the row of the sequence that each row of the repeated one is a copy of.
        scored_repeated: int64 [S], the scored rows in the repeated sequence.
    """

    layout: PackedLayout
    scored: Tensor
    repeated: PackedLayout
    index: Tensor
    scored_repeated: Tensor

    @staticmethod
    def of(tree: SegmentTree) -> PackedSequence:
        """Lay out a segment tree both ways."""
        lengths, parents = tree
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        rows = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
        seeds = {parent for parent in parents if parent >= 0}
        leaves = [segment for segment in range(len(lengths)) if segment not in seeds]
        paths = [([rows[parents[leaf]]] if parents[leaf] >= 0 else []) + [rows[leaf]] for leaf in leaves]
        ends = torch.tensor([sum(map(len, path)) for path in paths]).cumsum(0)
        return PackedSequence(
            PackedLayout.from_tree(lengths, parents) if seeds else PackedLayout.from_lengths(lengths),
            torch.cat([rows[leaf] for leaf in leaves]),
            PackedLayout.from_lengths([sum(map(len, path)) for path in paths]),
            torch.cat([part for path in paths for part in path]),
            torch.cat([torch.arange(end - len(path[-1]), end) for end, path in zip(ends, paths, strict=True)]),
        )

    def to(self, target: torch.device) -> PackedSequence:
        """Return a copy on the target device."""
        moved = {name: getattr(self, name).to(target) for name in self.__dataclass_fields__}
        return replace(self, **moved)


def attention() -> Iterator[Case]:
    """Every head layout, size, length distribution and pass; on a CPU one small layout."""
    cuda = torch.cuda.is_available()
    shapes = [(64, 8, 128), (24, 8, 128), (64, 8, 64), (24, 8, 64)] if cuda else [(4, 2, 64)]
    sizes = (16384, 8192, 32768) if cuda else (4096,)
    names = [*LENGTH_DISTRIBUTIONS, "dense", *(f"{count} partners a seed" for count in PARTNER_COUNTS)]
    if machine.tiny():
        shapes, sizes, names = [(2, 1, 16)], (64,), ["dense", "2 partners a seed"]
    kinds = PASSES if cuda else ("forward", "both")
    combinations = list(product(enumerate(shapes), sizes, names, kinds))
    # the first head layouts and the first size matter most, and forward and backward alone more than both in one
    combinations.sort(key=lambda it: it[0][0] + 4 * (it[1] != sizes[0]) + 2 * (it[3] == "both"))
    for (_, heads), tokens, name, kind in combinations:
        yield _case(name, _tree(name, tokens), heads, kind)


def _tree(name: str, tokens: int) -> SegmentTree:
    return shared_seeds(int(name.split()[0]), tokens) if "partners" in name else documents(name, tokens)


def _case(name: str, tree: SegmentTree, heads: tuple[int, int, int], kind: str, small: bool = False) -> Case:
    device = machine.device()
    sequence = PackedSequence.of(tree).to(device)
    tokens = len(sequence.layout)
    query_heads, key_heads, width = heads
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32

    def inputs(generator: torch.Generator) -> Tensors:
        shapes = {"q": query_heads, "k": key_heads, "v": key_heads, "dout": query_heads}
        tensors = {
            key: torch.randn(tokens, count, width, device=device, dtype=dtype, generator=generator)
            for key, count in shapes.items()
        }
        tensors["dout"] = torch.zeros_like(tensors["dout"]).index_copy(0, sequence.scored, tensors["dout"][sequence.scored])
        return tensors

    shared = "partners" in name
    pairs = sequence.layout.visible_pairs()
    check = None
    if tokens > CHECKED_TOKENS and not small:
        check = _case(name, _tree(name, CHECKED_TOKENS), heads, kind, small=True)
    flops = PRODUCTS[kind] * 2.0 * query_heads * width * pairs
    return Case(
        {"lengths": name, "tokens": tokens, "heads": f"{query_heads}:{key_heads}", "width": width, "pass": kind},
        inputs,
        _providers(sequence, kind, name),
        lambda tensors: _exact(tensors, sequence, kind),
        work=float(len(sequence.scored)) if shared else flops / 1e12,
        unit="loss tokens" if shared else "useful TFLOP",
        flops=flops,
        baselines=("one operation, dense mask",),
        check=check,
    )


def _providers(sequence: PackedSequence, kind: str, name: str) -> dict[str, Provider]:
    def by_name(backend: str) -> Attend:
        return lambda q, k, v, layout: packed_attention(q, k, v, layout, backend=backend)

    cuda = torch.cuda.is_available()
    ours: dict[str, Attend] = {"ours": by_name("auto")}
    if cuda:
        ours["ours, Hopper forward"] = by_name("triton-hopper")
        ours["ours, Gluon forward"] = by_name("gluon-hopper")
    providers = {title: _provider(attend, sequence, kind, repeat=False) for title, attend in ours.items()}
    if len(sequence.layout) <= (CHECKED_TOKENS if cuda else 1 << 20):
        providers["one operation, dense mask"] = _provider(by_name("sdpa"), sequence, kind, repeat=False)
    repeat = len(sequence.index) > len(sequence.layout)
    providers["flex"] = _provider(by_name("flex"), sequence, kind, repeat=False)
    providers["flex, its mask made"] = _provider(_flex_with_its_mask, sequence, kind, repeat=False)
    if cuda:
        providers["flash-attn-4"] = _provider(by_name("flash-attn-4"), sequence, kind, repeat=False)
        providers["flex, FlashAttention-4"] = _provider(_flex_with_flash_attn_4, sequence, kind, repeat=False)
    for backend in THIRD_PARTY_BACKENDS if repeat else THIRD_PARTY_BACKENDS[1:]:
        suffix = ", seed repeated" if repeat else ""
        providers[backend + suffix] = _provider(by_name(backend), sequence, kind, repeat=repeat)
    if name == "dense":
        providers["cuDNN"] = _provider(_cudnn, sequence, kind, repeat=False)
    return providers


def _provider(attend: Attend, sequence: PackedSequence, kind: str, *, repeat: bool) -> Provider:
    layout, index = (sequence.repeated, sequence.index) if repeat else (sequence.layout, None)
    scored = sequence.scored_repeated if repeat else sequence.scored

    def provider(tensors: Tensors) -> Prepared:
        q, k, v, dout = (tensors[name] if index is None else tensors[name][index] for name in ("q", "k", "v", "dout"))
        if index is not None:  # the repeated seed carries no loss
            dout = torch.zeros_like(dout).index_copy(0, scored, dout[scored])
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]

        def forward() -> tuple[Tensor]:
            with torch.no_grad():
                return (attend(q, k, v, layout),)

        def both() -> tuple[Tensor, ...]:
            out = attend(*leaves, layout)
            return (out.detach(), *torch.autograd.grad(out, leaves, dout))

        def results(output: tuple[Tensor, ...]) -> Tensors:
            named: Tensors = dict(zip(("out", "dq", "dk", "dv"), output, strict=False))
            restored: Tensors = {name: named[name][scored] for name in ("out", "dq") if name in named}
            for name in ("dk", "dv"):
                if name in named and index is not None:
                    total = torch.zeros_like(tensors["k"], dtype=torch.float32)
                    restored[name] = total.index_add(0, index, named[name].float())
                elif name in named:
                    restored[name] = named[name]
            return restored

        if kind == "backward":
            out = attend(*leaves, layout)
            saved = out.detach()
            return Prepared(lambda: (saved, *torch.autograd.grad(out, leaves, dout, retain_graph=True)), results)
        return Prepared(forward if kind == "forward" else both, results)

    return provider


def _exact(tensors: Tensors, sequence: PackedSequence, kind: str) -> Tensors:
    q, k, v = (tensors[name].double().requires_grad_() for name in ("q", "k", "v"))
    out = reference.packed_attention(q, k, v, sequence.layout)
    exact = {"out": out.detach()[sequence.scored]}
    if kind != "forward":
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), tensors["dout"].double())
        exact |= {"dq": dq[sequence.scored], "dk": dk, "dv": dv}
    return exact


def _cudnn(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    if not q.is_cuda:
        raise ValueError("cuDNN needs CUDA")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def _flex_with_its_mask(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    return _compiled_flex(q, k, v, layout, {})


def _flex_with_flash_attn_4(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    return _compiled_flex(q, k, v, layout, {"BACKEND": "FLASH"})


def _compiled_flex(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, options: dict[str, str]) -> Tensor:
    """FlexAttention as its users call it: torch makes the block mask of a batch from a mask function."""
    from torch.nn.attention.flex_attention import create_block_mask

    if not q.is_cuda:
        raise ValueError("measured on CUDA alone: uncompiled it would only be slow")
    until = layout.visible_until

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < until[key])

    mask = _compiled(create_block_mask)(visible, None, None, len(layout), len(layout), device=q.device)
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = _compiled(_flex())(*heads_first, block_mask=mask, enable_gqa=True, kernel_options=options)
    return out.squeeze(0).transpose(0, 1)


def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


_COMPILED: dict[Callable[..., Any], Callable[..., Any]] = {}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return _COMPILED.setdefault(function, torch.compile(function))
