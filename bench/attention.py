"""Attention over documents and over shared seeds, against everything else that can compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sbp_kernels import PackedLayout, packed_attention
from sbp_kernels.attention import reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.case import Case, Prepared, Provider, Tensors
from bench.machine import device
from bench.mixes import MIXES, PARTNERS, Forest, documents, shared_seeds

Attend = Callable[..., Tensor]  # of q, k, v and the layout
PASSES = ("forward", "backward", "both")
PRODUCTS = {"forward": 2, "backward": 5, "both": 7}  # matrix products that the definition needs, FlashAttention's count
PEERS = ("flex", "varlen", "xformers", "flash-attn")
CHECKED_TOKENS = 1024  # the definition in float64 needs a score for every pair and head


@dataclass(frozen=True)
class Stream:
    """A packed stream, and the same documents for kernels that must repeat a seed for each of its partners.

    Attributes:
        scored: rows whose output carries loss; `scored_repeated`: the same rows in the repeated stream.
        index: for each row of the repeated stream, the row that it repeats.
    """

    layout: PackedLayout
    scored: Tensor
    repeated: PackedLayout
    index: Tensor
    scored_repeated: Tensor

    @staticmethod
    def of(forest: Forest) -> Stream:
        lengths, parents = forest
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        rows = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
        seeds = {parent for parent in parents if parent >= 0}
        leaves = [segment for segment in range(len(lengths)) if segment not in seeds]
        paths = [([rows[parents[leaf]]] if parents[leaf] >= 0 else []) + [rows[leaf]] for leaf in leaves]
        ends = torch.tensor([sum(map(len, path)) for path in paths]).cumsum(0)
        return Stream(
            PackedLayout.from_tree(lengths, parents) if seeds else PackedLayout.from_lengths(lengths),
            torch.cat([rows[leaf] for leaf in leaves]),
            PackedLayout.from_lengths([sum(map(len, path)) for path in paths]),
            torch.cat([part for path in paths for part in path]),
            torch.cat([torch.arange(end - len(path[-1]), end) for end, path in zip(ends, paths, strict=True)]),
        )

    def to(self, target: torch.device) -> Stream:
        moved = {name: getattr(self, name).to(target) for name in self.__dataclass_fields__}
        return replace(self, **moved)


def attention() -> Iterator[Case]:
    cuda = torch.cuda.is_available()
    shapes = [(64, 8, 128), (24, 8, 128), (64, 8, 64), (24, 8, 64)] if cuda else [(4, 2, 64)]
    sizes = (16384, 8192, 32768) if cuda else (4096,)
    for position, (query_heads, key_heads, width) in enumerate(shapes):
        for tokens in sizes:
            forests = {name: documents(name, tokens) for name in (*MIXES, "dense")}
            forests |= {f"{count} partners a seed": shared_seeds(count, tokens) for count in PARTNERS}
            for name, forest in forests.items():
                for kind in PASSES if cuda else ("forward", "both"):
                    importance = position + 4 * (tokens != sizes[0]) + 2 * (kind == "both")
                    yield _case(name, forest, (query_heads, key_heads, width), kind, importance)


def _case(name: str, forest: Forest, heads: tuple[int, int, int], kind: str, importance: int, small: bool = False) -> Case:
    stream = Stream.of(forest).to(device())
    tokens = len(stream.layout)
    query_heads, key_heads, width = heads
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32

    def inputs(generator: torch.Generator) -> Tensors:
        shapes = {"q": query_heads, "k": key_heads, "v": key_heads, "dout": query_heads}
        made = {
            key: torch.randn(tokens, count, width, device=device(), dtype=dtype, generator=generator)
            for key, count in shapes.items()
        }
        made["dout"] = torch.zeros_like(made["dout"]).index_copy(0, stream.scored, made["dout"][stream.scored])
        return made

    shared = "partners" in name
    pairs = stream.layout.visible_pairs()
    check = None
    if tokens > CHECKED_TOKENS and not small:
        smaller = shared_seeds(int(name.split()[0]), CHECKED_TOKENS) if shared else documents(name, CHECKED_TOKENS)
        check = _case(name, smaller, heads, kind, importance, small=True)
    flops = PRODUCTS[kind] * 2.0 * query_heads * width * pairs
    return Case(
        {"stream": name, "tokens": tokens, "heads": f"{query_heads}:{key_heads}", "width": width, "pass": kind},
        inputs,
        _providers(stream, kind, name),
        lambda given: _exact(given, stream, kind),
        work=float(len(stream.scored)) if shared else flops / 1e12,
        unit="loss tokens" if shared else "useful TFLOP",
        flops=flops,
        judges=("one operation, dense mask",),
        check=check,
        importance=importance,
    )


def _providers(stream: Stream, kind: str, name: str) -> dict[str, Provider]:
    def by_name(backend: str) -> Attend:
        return lambda q, k, v, layout: packed_attention(q, k, v, layout, backend=backend)

    cuda = torch.cuda.is_available()
    ours: dict[str, Attend] = {"ours": by_name("auto")}
    if cuda:
        ours["ours, Hopper forward"] = by_name("triton-hopper")
    providers = {title: _provider(attend, stream, kind, repeat=False) for title, attend in ours.items()}
    if len(stream.layout) <= (CHECKED_TOKENS if cuda else 1 << 20):
        providers["one operation, dense mask"] = _provider(by_name("sdpa"), stream, kind, repeat=False)
    repeat = len(stream.index) > len(stream.layout)
    providers["flex"] = _provider(by_name("flex"), stream, kind, repeat=False)
    providers["flex, its mask made"] = _provider(_flex_with_its_mask, stream, kind, repeat=False)
    for backend in PEERS if repeat else PEERS[1:]:
        suffix = ", seed repeated" if repeat else ""
        providers[backend + suffix] = _provider(by_name(backend), stream, kind, repeat=repeat)
    if name == "dense":
        providers["cuDNN"] = _provider(_cudnn, stream, kind, repeat=False)
    return providers


def _provider(attend: Attend, stream: Stream, kind: str, *, repeat: bool) -> Provider:
    layout, index = (stream.repeated, stream.index) if repeat else (stream.layout, None)
    scored = stream.scored_repeated if repeat else stream.scored

    def provider(given: Tensors) -> Prepared:
        q, k, v, dout = (given[name] if index is None else given[name][index] for name in ("q", "k", "v", "dout"))
        if index is not None:  # the repeated seed carries no loss
            dout = torch.zeros_like(dout).index_copy(0, scored, dout[scored])
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]

        def forward() -> tuple[Tensor]:
            with torch.no_grad():
                return (attend(q, k, v, layout),)

        def both() -> tuple[Tensor, ...]:
            out = attend(*leaves, layout)
            return (out.detach(), *torch.autograd.grad(out, leaves, dout))

        def results(found: tuple[Tensor, ...]) -> Tensors:
            named: Tensors = dict(zip(("out", "dq", "dk", "dv"), found, strict=False))
            restored: Tensors = {name: named[name][scored] for name in ("out", "dq") if name in named}
            for name in ("dk", "dv"):
                if name in named and index is not None:
                    total = torch.zeros_like(given["k"], dtype=torch.float32)
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


def _exact(given: Tensors, stream: Stream, kind: str) -> Tensors:
    q, k, v = (given[name].double().requires_grad_() for name in ("q", "k", "v"))
    out = reference.packed_attention(q, k, v, stream.layout)
    exact = {"out": out.detach()[stream.scored]}
    if kind != "forward":
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), given["dout"].double())
        exact |= {"dq": dq[stream.scored], "dk": dk, "dv": dv}
    return exact


def _cudnn(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    if not q.is_cuda:
        raise ValueError("cuDNN needs CUDA")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def _flex_with_its_mask(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """As its users write it: the block mask of a batch is made by torch's own function, from a mask function."""
    from torch.nn.attention.flex_attention import create_block_mask

    if not q.is_cuda:
        raise ValueError("measured on CUDA alone: uncompiled it would only be slow")
    until = layout.visible_until

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < until[key])

    mask = _compiled(create_block_mask)(visible, None, None, len(layout), len(layout), device=q.device)
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = _compiled(_flex())(*heads_first, block_mask=mask, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


_COMPILED: dict[Callable[..., Any], Callable[..., Any]] = {}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return _COMPILED.setdefault(function, torch.compile(function))
