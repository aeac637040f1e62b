"""RMSNorm, query and key norm with rotary embedding, and SwiGLU, beside torch.compile and Liger; then sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from sbp_kernels.norm import rms_norm
from sbp_kernels.rope import qk_norm_rope
from sbp_kernels.swiglu import swiglu
from torch import Tensor

from bench import machine
from bench.case import Case, Prepared, Provider, Tensors
from bench.sampling import sampling

Function = Callable[..., tuple[Tensor, ...]]  # inputs with a gradient, then those without -> outputs
ROWS = 16384
CHECKED_ROWS = 256
POSITIONS = 4096


def small() -> Iterator[Case]:
    """Each operation at the sizes of real models, on CUDA alone: elsewhere it is plain torch, with nothing to compare."""
    if machine.tiny():
        yield from (_norm(CHECKED_ROWS, 16, added=True), _rotary(CHECKED_ROWS, 2, 1, 16), _swiglu(CHECKED_ROWS, 16))
        yield from sampling()
        return
    if not torch.cuda.is_available():
        return
    for width in (2048, 3072, 4096):
        yield from (_norm(ROWS, width, added) for added in (False, True))
    for heads, key_heads in ((16, 8), (24, 8)):
        yield _rotary(ROWS, heads, key_heads, 128)
    for width in (6144, 8064):
        yield _swiglu(ROWS, width)
    yield from sampling()


def _norm(rows: int, width: int, added: bool) -> Case:
    def apply(backend: str) -> Function:
        def function(x: Tensor, weight: Tensor, *residual: Tensor) -> tuple[Tensor, ...]:
            if residual:
                return rms_norm(x, weight, residual=residual[0], backend=backend)
            return (rms_norm(x, weight, backend=backend),)

        return function

    def liger(x: Tensor, weight: Tensor, *residual: Tensor) -> tuple[Tensor, ...]:
        library = import_module("liger_kernel.transformers.functional")
        if residual:
            return library.liger_fused_add_rms_norm(x, residual[0], weight, 1e-6, in_place=False)
        return (library.liger_rms_norm(x, weight, 1e-6, in_place=False),)

    name = "rms_norm with residual" if added else "rms_norm"
    shapes = {"x": (rows, width), "weight": (width,)} | ({"residual": (rows, width)} if added else {})
    passes = 9 if added else 5  # forward: x (and residual) in, y (and sum) out; backward: dy (and dsum), x in, dx out
    smaller = lambda: _norm(CHECKED_ROWS, width, added)  # noqa: E731
    return _case(name, {"rows": rows, "width": width}, shapes, {}, apply, {"Liger": liger}, passes * rows * width, smaller)


def _rotary(rows: int, heads: int, key_heads: int, width: int) -> Case:
    def apply(backend: str) -> Function:
        def function(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            return qk_norm_rope(
                qkv, q_weight, k_weight, positions, heads=heads, key_value_heads=key_heads, theta=5e5, backend=backend
            )

        return function

    shapes = {"qkv": (rows, heads + 2 * key_heads, width), "q_weight": (width,), "k_weight": (width,)}
    fixed = {"positions": (torch.arange(rows, device=machine.device()) % POSITIONS).int()}
    numbers = rows * width * (2 * (heads + key_heads) + 3 * (heads + key_heads) + 2 * key_heads)
    smaller = lambda: _rotary(CHECKED_ROWS, heads, key_heads, width)  # noqa: E731
    shape = {"rows": rows, "heads": f"{heads}:{key_heads}", "width": width}
    return _case("qk_norm_rope", shape, shapes, fixed, apply, {}, numbers, smaller)


def _swiglu(rows: int, width: int) -> Case:
    def apply(backend: str) -> Function:
        return lambda gate_up: (swiglu(gate_up, backend=backend),)

    def liger(gate_up: Tensor) -> tuple[Tensor, ...]:
        library = import_module("liger_kernel.transformers.functional")
        return (library.liger_swiglu(*(x.contiguous() for x in gate_up.chunk(2, -1))),)

    smaller = lambda: _swiglu(CHECKED_ROWS, width)  # noqa: E731
    numbers = rows * width * 8  # forward: gate and up in, product out; backward: both and its gradient in, two out
    shape = {"rows": rows, "width": width}
    return _case("swiglu", shape, {"gate_up": (rows, 2 * width)}, {}, apply, {"Liger": liger}, numbers, smaller)


def _case(
    name: str,
    shape: Mapping[str, Any],
    shapes: dict[str, tuple[int, ...]],
    fixed: Tensors,
    apply: Callable[[str], Function],
    libraries: dict[str, Function],
    numbers: float,
    smaller: Callable[[], Case],
) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        # Triton's interpreter cuts bfloat16 off where the device rounds it
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float16
        options: dict[str, Any] = {"device": machine.device(), "dtype": dtype, "generator": generator}
        return {key: torch.randn(size, **options) for key, size in shapes.items()} | fixed

    plain = apply("torch")
    functions = {"ours": apply("triton"), "eager": plain, **libraries}
    if torch.cuda.is_available():
        functions["compiled"] = torch.compile(plain)
    checked = shape["rows"] == CHECKED_ROWS
    return Case(
        {"operation": name, **shape, "pass": "both"},
        inputs,
        {title: _provider(function, list(shapes), list(fixed)) for title, function in functions.items()},
        lambda tensors: _exact(plain, tensors, list(shapes), list(fixed)),
        work=2 * numbers / 1e9,
        unit="GB",
        bytes=2.0 * numbers,
        baselines=("eager",),
        check=None if checked else smaller(),
    )


def _provider(function: Function, leaves: list[str], fixed: list[str]) -> Provider:
    def provider(tensors: Tensors) -> Prepared:
        inputs = [tensors[name].detach().requires_grad_() for name in leaves]
        rest = [tensors[name] for name in fixed]
        gradients = _upstream(function(*inputs, *rest))

        def run() -> Tensors:
            out = function(*inputs, *rest)
            return _named(out, leaves, torch.autograd.grad(out, inputs, gradients))

        return Prepared(run)

    return provider


def _exact(function: Function, tensors: Tensors, leaves: list[str], fixed: list[str]) -> Tensors:
    """Results in float64, from the bf16 gradients of the outputs that every provider gets."""
    inputs = [tensors[name].double().requires_grad_() for name in leaves]
    out = function(*inputs, *(tensors[name] for name in fixed))
    return _named(out, leaves, torch.autograd.grad(out, inputs, _upstream(out)))


def _named(out: tuple[Tensor, ...], leaves: list[str], gradients: tuple[Tensor, ...]) -> Tensors:
    named = {f"out {index}": x.detach() for index, x in enumerate(out)}
    return named | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def _upstream(out: tuple[Tensor, ...]) -> list[Tensor]:
    """The same random gradients of the outputs for every provider and dtype, each a bf16 number."""
    generator = torch.Generator(machine.device()).manual_seed(0)
    random = [torch.empty(x.shape, dtype=torch.bfloat16, device=x.device).normal_(generator=generator) for x in out]
    return [gradient.to(x.dtype) for gradient, x in zip(random, out, strict=True)]
