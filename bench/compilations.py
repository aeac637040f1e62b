"""Launches that are compiled ahead of time: those of every kernel at the shapes and types of real models.

Each launcher is called on tensors without data, so that what is compiled is what it would start on a GPU. Adding a kernel is
one more call of `launches`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from sbp_kernels import _tuned
from sbp_kernels._tuned import Configuration
from sbp_kernels.attention import gluon, hopper
from sbp_kernels.attention import launch as attention_kernels
from sbp_kernels.decode import DecodeLayout
from sbp_kernels.decode import triton as decode_kernels
from sbp_kernels.layout.plan import NARROW, WIDE, Tiles, capacities
from sbp_kernels.linear_cross_entropy import launch as linear_cross_entropy_launch
from sbp_kernels.nearest import triton as nearest_kernels
from sbp_kernels.norm import triton as norm_kernels
from sbp_kernels.repeats import triton as repeats_kernels
from sbp_kernels.rope import triton as rope_kernels
from sbp_kernels.sampling import triton as sampling_kernels
from sbp_kernels.swiglu import triton as swiglu_kernels
from torch import Tensor

from bench.aot.compilation import TARGETS, Compilation, Requirements, launches
from bench.aot.integers import unusual_integers

TOKENS = 16_384
META = torch.device("meta")
ARCHITECTURES = {"sm_80": "8.0", "sm_90": "9.0", "sm_100": "10.0", "gfx942": "gfx942"}  # as the table of `_tuned` names them
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
TYPE_NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP8: "fp8"}
# products of warps, where tiles are too low for those of warp groups
PRODUCTS = {"sm_80": ("HMMA",), "sm_90": ("HMMA",), "sm_100": ("HMMA",), "gfx942": ("MFMA",)}
LOSS_PRODUCTS = ("statistics_kernel", "logit_gradient_kernel", "hidden_gradient_kernel", "weight_gradient_kernel")

# Tiles were chosen for sm_90, where nothing may spill. Elsewhere this much may, and the table holds what does.
SPILLS = {"sm_80": 64, "sm_100": 384, "gfx942": 4096}
ANY_SPILLS = dict.fromkeys(TARGETS, 131_072)  # of float32 attention, which is there for checking


def compilations() -> Iterator[Compilation]:
    """All of them, then each kernel with unusual integers; what two launches share is listed once."""
    usual = list(usual_launches())
    seen: set[tuple[str, str]] = set()
    for compilation in chain(usual, unusual_integers(usual)):
        fingerprint = compilation.fingerprint()
        targets = tuple(target for target in compilation.targets if (fingerprint, target) not in seen)
        seen.update((fingerprint, target) for target in targets)
        if targets:
            yield replace(compilation, targets=targets)


def usual_launches() -> Iterator[Compilation]:
    """Every kernel at the shapes and types of real models."""
    return chain(
        attention(),
        specialised_attention(),
        linear_cross_entropy(),
        rms_norm(),
        qk_norm_rope(),
        swiglu(),
        decode(),
        sampling(),
        repetition(),
        nearest(),
    )


def attention() -> Iterator[Compilation]:
    """Forward and backward in every configuration of the table; 24:8 are the heads of the 3B model, 16:8 those of the 1B model.

    Float32, which is there for checking, is in no table.
    """
    for heads, width, dtype, distribution in (
        ((24, 8), 128, BF16, "long"),
        ((24, 8), 128, BF16, "short"),
        ((16, 8), 128, BF16, "long"),
        ((24, 8), 64, BF16, "long"),
        ((24, 8), 64, BF16, "short"),
        ((24, 8), 96, BF16, "long"),
        ((24, 8), 128, FP16, "long"),
        ((24, 8), 128, FP32, "short"),
    ):
        requires = Requirements(tensor_cores=dtype != FP32, spill_bytes=ANY_SPILLS if dtype == FP32 else SPILLS)
        by_kernel = {"combine_kernel": Requirements()}
        for shared_seeds in (False, True) if (heads, width, dtype) == ((24, 8), 128, BF16) else (False,):
            name = f"attention{' with shared seeds' if shared_seeds else ''}, {distribution} documents"
            name += f", {heads[0]}:{heads[1]} heads of {width}, {TYPE_NAMES[dtype]}"
            case = (heads, width, dtype, distribution, shared_seeds)
            yield from by_architecture(name, _attention, *case, requires=requires, by_kernel=by_kernel)


def by_architecture(name: str, launch: Callable[..., object], *arguments: Any, **requirements: Any) -> Iterator[Compilation]:
    """Yield what `launches` does where launchers choose by the device; devices that are launched alike share a compilation."""
    merged: dict[str, Compilation] = {}
    for target, architecture in ARCHITECTURES.items():
        with patch.object(_tuned, "architecture", return_value=architecture):
            for compilation in launches(name, launch, *arguments, **requirements, targets=[target]):
                known = merged.setdefault(compilation.fingerprint(), compilation)
                if known is not compilation:
                    merged[compilation.fingerprint()] = replace(known, targets=(*known.targets, target))
    names = Counter(compilation.name for compilation in merged.values())
    for compilation in merged.values():
        suffix = f" on {', '.join(compilation.targets)}" if names[compilation.name] > 1 else ""
        yield replace(compilation, name=compilation.name + suffix)


def _attention(heads: tuple[int, int], width: int, dtype: torch.dtype, distribution: str, shared_seeds: bool) -> None:
    """Documents, or trees whose key tiles may be split and whose log-sum-exp has a gradient too."""
    sizes = _tuned.sizes_of_plans(META, width)
    assert sizes is not None
    chosen = astuple(NARROW) if dtype == FP32 else sizes[_tuned.DISTRIBUTIONS.index(distribution)]
    configuration = _tuned.configuration(META, width, dtype, chosen)
    launch_attention(heads, width, dtype, configuration, shared_seeds)


def launch_attention(
    heads: tuple[int, int], width: int, dtype: torch.dtype, configuration: Configuration, shared_seeds: bool = False
) -> None:
    """Launch forward and backward in one configuration."""
    q = _empty(TOKENS, heads[0], width, dtype=dtype)
    k, v = (_empty(TOKENS, heads[1], width, dtype=dtype) for _ in range(2))
    until = _empty(TOKENS, dtype=torch.int32)
    rows = capacities(TOKENS, Tiles(*configuration.sizes), may_split=shared_seeds)
    tables = tuple(_empty(n, columns, dtype=torch.int32) for n, columns in zip(rows, (6, 2, 6, 2, 4), strict=True))
    out, lse = attention_kernels.forward(q, k, v, until, tables[0], tables[1], 1.0, configuration)
    attention_kernels.backward(out, lse if shared_seeds else None, q, k, v, out, lse, until, tables, 1.0, configuration)


def specialised_attention() -> Iterator[Compilation]:
    """The forwards for Hopper, in which some warps copy and two groups multiply; for Gluon steps of 128 keys, too."""
    requires = Requirements(tensor_cores=True, instructions={"sm_90": ("UTMALDG", "USETMAXREG")})
    refused = replace(requires, impossible={"3.9.0 sm_90": "Triton shares out the rows of visible_until too"})
    for width, tiles in itertools.product((128, 64), (WIDE, NARROW)):
        name = f"{'wide' if tiles is WIDE else 'narrow'} tiles, 24:8 heads of {width}, bf16"
        for kind, forward, needed in (
            ("attention", hopper.launch, refused if tiles is WIDE else requires),
            ("attention in Gluon", gluon.launch, requires),
        ):
            case = (forward, width, tiles.query_rows, tiles.key_step)
            yield from launches(
                f"{kind} for Hopper, {name}", _specialised_attention, *case, requires=needed, targets=("sm_90",)
            )
    wider = replace(requires, spill_bytes={"sm_90": 32})  # with Triton 3.9
    for width in (128, 64):
        name = f"attention in Gluon for Hopper, steps of 128 keys, 24:8 heads of {width}, bf16"
        case = (gluon.launch, width, WIDE.query_rows, 128)
        yield from launches(name, _specialised_attention, *case, requires=wider, targets=("sm_90",))


def _specialised_attention(forward: Callable[..., object], width: int, rows: int, step: int) -> None:
    q, k = (_empty(TOKENS, heads, width, dtype=BF16) for heads in (24, 8))
    query_tiles, query_runs, *_ = capacities(TOKENS, Tiles(rows, step, rows, step), may_split=False)
    until, *tables = (_empty(*shape, dtype=torch.int32) for shape in ((TOKENS,), (query_tiles, 6), (query_runs, 2)))
    forward(q, k, k, until, *tables, 1.0, rows, step)


def linear_cross_entropy() -> Iterator[Compilation]:
    """Both modes; the vocabularies of the 1B and the 3B model, and of Qwen3."""
    copies = {"sm_90": ("UTMALDG",), "sm_100": ("UTMALDG",)}
    products = Requirements(tensor_cores=True, spill_bytes=SPILLS, instructions=copies)
    for width, vocabulary, dtype, softcap, smoothed in (
        (3072, 49_152, BF16, 0.0, False),
        (2048, 49_152, BF16, 0.0, False),
        (2048, 151_936, BF16, 0.0, False),
        (3072, 49_152, BF16, 30.0, True),
        (3072, 49_152, FP16, 0.0, False),
        (3072, 49_152, FP32, 0.0, False),
    ):
        case = (width, vocabulary, dtype, softcap, smoothed)
        options = " with softcap and label smoothing" if smoothed else ""
        name = f"loss{options}, {width} wide, vocabulary {vocabulary:,}, {TYPE_NAMES[dtype]}"
        yield from launches(f"{name}, slabs", _loss_in_slabs, *case)
        needed = Requirements(spill_bytes=SPILLS) if dtype == FP32 else products
        by_kernel = dict.fromkeys(LOSS_PRODUCTS, needed)
        for large, targets in ((True, ("sm_90", "sm_100")), (False, ("sm_80", "gfx942"))):
            with patch.object(linear_cross_entropy_launch, "large_tiles", return_value=large):
                tiles = "large tiles" if large else "small tiles"
                recomputed = f"{name}, recomputed, {tiles}"
                yield from launches(recomputed, _loss_recomputed, *case, by_kernel=by_kernel, targets=targets)


def _loss_in_slabs(width: int, vocabulary: int, dtype: torch.dtype, softcap: float, smoothed: bool) -> None:
    """Statistics with the gradient, either of them alone, and the rows on their way in and out."""
    rows = 2048
    hidden, logits = _empty(TOKENS, width, dtype=dtype), _empty(rows, vocabulary, dtype=dtype)
    index = _empty(rows, dtype=torch.int32)
    statistics, coefficients = (_empty(n, TOKENS // 2, dtype=FP32)[:, :rows] for n in (4, 3))
    for gradient, known in ((coefficients, False), (None, False), (coefficients, True)):
        linear_cross_entropy_launch.slab(statistics, logits, index, gradient, known, 1e-4, softcap, smoothed)
    part = linear_cross_entropy_launch.gather(hidden, index)
    for scale in (None, _empty(1, dtype=FP32)):
        linear_cross_entropy_launch.scatter(hidden, index, part, scale)


def _loss_recomputed(width: int, vocabulary: int, dtype: torch.dtype, softcap: float, smoothed: bool) -> None:
    hidden, weight = _empty(TOKENS, width, dtype=dtype), _empty(vocabulary, width, dtype=dtype)
    rows, count, scale = _empty(TOKENS // 2, dtype=torch.int32), _empty(dtype=torch.int32), _empty(1, dtype=FP32)
    inputs = (hidden, weight, rows, rows, count)
    found = linear_cross_entropy_launch.statistics(*inputs, softcap, smoothed)
    linear_cross_entropy_launch.gradients(*inputs, found[0], found[1:], scale, softcap, smoothed, hidden, weight)


def rms_norm() -> Iterator[Compilation]:
    """With and without a residual, at the widths of the 1B and the 3B model, and wider than a block."""
    for width, dtype in ((2048, BF16), (3072, BF16), (3072, FP16), (3072, FP32), (20_480, BF16)):
        for residual in (False, True):
            name = f"RMSNorm{' of a sum' if residual else ''}, {width} wide, {TYPE_NAMES[dtype]}"
            yield from launches(name, _rms_norm, width, dtype, residual, requires=Requirements(spill_bytes={"sm_100": 32}))


def _rms_norm(width: int, dtype: torch.dtype, residual: bool) -> None:
    x, weight = _empty(TOKENS, width, dtype=dtype), _empty(width, dtype=dtype)
    y, total, rstd = norm_kernels.forward(x, x if residual else None, weight, 1e-6)
    norm_kernels.backward(y, x if residual else None, total, weight, rstd)


def qk_norm_rope() -> Iterator[Compilation]:
    """With and without the norms, on the heads of the 1B and the 3B model, and narrower ones."""
    for heads, width, dtype, norm in (
        ((16, 8), 128, BF16, True),
        ((24, 8), 128, BF16, True),
        ((24, 8), 128, BF16, False),
        ((24, 8), 64, BF16, True),
        ((24, 8), 96, BF16, True),
        ((24, 8), 128, FP16, True),
        ((24, 8), 128, FP32, True),
    ):
        name = f"RoPE{' with QK norm' if norm else ''}, {heads[0]}:{heads[1]} heads of {width}, {TYPE_NAMES[dtype]}"
        yield from launches(name, _qk_norm_rope, heads, width, dtype, norm)


def _qk_norm_rope(heads: tuple[int, int], width: int, dtype: torch.dtype, norm: bool) -> None:
    qkv = _empty(TOKENS, heads[0] + 2 * heads[1], width, dtype=dtype)
    weight = _empty(width, dtype=dtype) if norm else None
    positions, frequencies = _empty(TOKENS, dtype=torch.int64), _empty(width // 2, dtype=torch.int64)
    q, k, rstd = rope_kernels.forward(qkv, weight, weight, positions, frequencies, *heads, 1e4, 1e-6)
    rope_kernels.backward(q, k, k, qkv, weight, weight, positions, frequencies, rstd, 1e4)


def swiglu() -> Iterator[Compilation]:
    """With and without the product handed out again, at the widths of the 1B and the 3B model."""
    for width, dtype in ((5632, BF16), (8064, BF16), (8064, FP16), (8064, FP32)):
        for emit in (False, True):
            name = f"SwiGLU{' with the product' if emit else ''}, {width} wide, {TYPE_NAMES[dtype]}"
            yield from launches(name, _swiglu, width, dtype, emit)


def _swiglu(width: int, dtype: torch.dtype, emit: bool) -> None:
    gate_up = _empty(TOKENS, 2 * width, dtype=dtype)
    swiglu_kernels.backward(swiglu_kernels.forward(gate_up), gate_up, emit)


def decode() -> Iterator[Compilation]:
    """Steps of generation with the 3B model: a seed's samples in one tile, here of 16 or 32 rows, too low for wgmma."""
    for samples, width, page, dtype, stored in (
        (1, 128, 64, BF16, BF16),
        (4, 128, 64, BF16, BF16),
        (8, 128, 64, BF16, BF16),
        (8, 128, 64, BF16, FP8),
        (8, 128, 16, BF16, BF16),
        (8, 64, 64, BF16, BF16),
        (8, 128, 64, FP16, FP16),
        (8, 128, 64, FP32, FP32),
    ):
        kind = TYPE_NAMES[dtype] if stored == dtype else f"{TYPE_NAMES[dtype]} over pages of {TYPE_NAMES[stored]}"
        name = f"decode, {samples} samples a seed, 24:8 heads of {width}, pages of {page} tokens, {kind}"
        everywhere = Requirements(impossible={"sm_80": "there is no float8"} if stored == FP8 else {})
        products = replace(everywhere, spill_bytes=ANY_SPILLS) if dtype == FP32 else replace(everywhere, instructions=PRODUCTS)
        by_kernel = {"partial_kernel": products, "append_kernel": everywhere}
        for amd, targets in ((False, ("sm_80", "sm_90", "sm_100")), (True, ("gfx942",))):
            with patch.object(decode_kernels, "AMD", amd):
                case = (samples, width, page, dtype, stored)
                yield from launches(f"{name}{', AMD' if amd else ''}", _decode, *case, by_kernel=by_kernel, targets=targets)


def _decode(samples: int, width: int, page: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    rows, heads, key_heads = 512, 24, 8
    q = _empty(rows, heads, width, dtype=dtype)
    k = _empty(rows, key_heads, width, dtype=dtype)
    cache = _empty(16_384, key_heads, page, width, dtype=stored)
    layout = DecodeLayout.empty(rows // samples, samples, rows, 4096 // page, 1024 // page, device="meta")
    decode_kernels.append(k, k, cache, cache, layout.own_pages, layout.own_tokens)
    decode_kernels.attention(q, cache, cache, *layout.tensors, 1.0)


def sampling() -> Iterator[Compilation]:
    """Greedy, uncut, and with both cuts, also to a single token; the vocabularies of the 3B model and of Qwen3."""
    for vocabulary, dtype in ((49_152, FP32), (151_936, FP32), (151_936, BF16), (49_152, FP16)):
        # "cut to one": Triton makes an argument of 1 a constant
        cuts = (("cut", 1.0, 0.9, 50), ("cut to one", 1.0, 0.9, 1))
        for kind, *rule in (("greedy", 0.0, 1.0, 0), ("uncut", 1.0, 1.0, 0), *cuts):
            name = f"sampling, {kind}, vocabulary {vocabulary:,}, {TYPE_NAMES[dtype]}"
            yield from launches(name, _sampling, vocabulary, dtype, *rule, requires=Requirements(spill_bytes=SPILLS))


def _sampling(vocabulary: int, dtype: torch.dtype, temperature: float, top_p: float, top_k: int) -> None:
    logits, uniforms = _empty(512, vocabulary, dtype=dtype), _empty(512, dtype=torch.float64)
    sampling_kernels.sample_tokens(logits, uniforms, temperature, top_p, top_k, _empty(3, dtype=torch.int64))


def repetition() -> Iterator[Compilation]:
    """Texts of up to 1,024 tokens."""
    yield from launches("repeats, 1,024 tokens", _repetition)


def _repetition() -> None:
    runs, drawn = (_empty(512, 1024, dtype=dtype) for dtype in (torch.int16, torch.int32))
    repeats_kernels.repeats(runs, drawn, _empty(512, dtype=torch.int32), 64)


def nearest() -> Iterator[Compilation]:
    """Rounds of the self-join, 32 or 128 neighbours and the spare ones; float32 has another precision on AMD."""
    requires = Requirements(tensor_cores=True, spill_bytes=SPILLS)
    for neighbours, dtype in ((40, FP32), (136, FP32), (40, BF16), (40, FP16)):
        name = f"nearest in buckets, {neighbours} neighbours, {TYPE_NAMES[dtype]}"
        for amd, targets in ((False, ("sm_80", "sm_90", "sm_100")), (True, ("gfx942",))):
            with patch.object(nearest_kernels, "AMD", amd):
                title = f"{name}{', AMD' if amd else ''}"
                yield from launches(title, _nearest, neighbours, dtype, requires=requires, targets=targets)


def _nearest(neighbours: int, dtype: torch.dtype) -> None:
    queries, members = (_empty(rows, 384, dtype=dtype) for rows in (65_536, 200_000))
    places = _empty(65_536, neighbours, dtype=torch.int64)
    own, starts = _empty(65_536, dtype=torch.int64), _empty(448, dtype=torch.int64)
    nearest_kernels.nearest_in_buckets(_empty(*places.shape, dtype=FP32), places, queries, own, own, members, starts)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
