"""A compilation: a kernel with the types, constants and launch options that its launcher gives it."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import textwrap
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, KernelInterface, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Requirements:
    """Requirements on a binary, whatever the committed table says; `bench.aot.binary` describes the figures.

    Attributes:
        tensor_cores: products run on them: HMMA on sm_80, HGMMA and no HMMA on sm_90, tcgen05 or HMMA on sm_100,
            MFMA on gfx942.
        spill_bytes: target -> bytes of spill code allowed; none where a target is not named.
        instructions: target -> instructions that must be there, such as {"sm_90": ("UTMALDG", "USETMAXREG")}.
        atomics: atomics on global memory are allowed, which makes the order of sums arbitrary.
        impossible: target, or "release target" -> why the kernel can't compile or run there; nothing else is required there.
    """

    tensor_cores: bool = False
    spill_bytes: Mapping[str, int] = field(default_factory=dict)
    instructions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    atomics: bool = False
    impossible: Mapping[str, str] = field(default_factory=dict)

    def why_impossible(self, release: str, target: str) -> str | None:
        """Return why the kernel can't run there, or None where it can."""
        return self.impossible.get(f"{release} {target}", self.impossible.get(target))


@dataclass(frozen=True)
class Compilation:
    """One kernel as one launch specialises it.

    Attributes:
        name: unique, for people and for the table.
        kernel: the function under `@triton.jit`.
        signature: argument -> Triton type ("*bf16", "i32", "fp32"), for the arguments that are not in `constants`.
        constants: argument -> value, for `tl.constexpr` arguments and for those that a launch makes constant: 1 and None.
        aligned: arguments known to be a multiple of 16; pointers mostly are.
        options: of the launch: num_warps, num_stages and what else it names.
        requires: what must hold of every binary.
        targets: that the launch is for; launchers may start other tiles elsewhere.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    options: Mapping[str, Any]
    requires: Requirements = field(default_factory=Requirements)
    targets: tuple[str, ...] = tuple(TARGETS)

    def source(self) -> ASTSource:
        """Return what `triton.compile` takes.

        Raises:
            ValueError: an argument of the kernel is in neither or both of signature and constants, or one is no argument.
        """
        arguments = self.kernel.arg_names
        if sorted(arguments) != sorted([*self.signature, *self.constants]):
            raise ValueError(f"{self.name}: signature and constants must share out the arguments {', '.join(arguments)}.")
        types = {name: self.signature.get(name, "constexpr") for name in arguments}
        attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(arguments) if name in self.aligned}
        kind = GluonASTSource if self.kernel.is_gluon() else ASTSource
        return kind(self.kernel, types, dict(self.constants), attributes)

    def fingerprint(self) -> str:
        """Return a hash of what is compiled: the kernel, the functions of ours that it calls, types, constants, launch options.

        Triton's own cache key also moves with line numbers and between releases, and an interpreted kernel has none.
        """
        constants = {name: _sources(value) or str(value) for name, value in self.constants.items()}
        launch = [dict(self.signature), constants, sorted(self.aligned), dict(self.options)]
        text = json.dumps([_sources(self.kernel), *launch], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def launches(
    name: str,
    launch: Callable[..., object],
    *arguments: Any,
    requires: Requirements | None = None,
    by_kernel: Mapping[str, Requirements] | None = None,
    targets: Sequence[str] = tuple(TARGETS),
) -> Iterator[Compilation]:
    """Yield every kernel that `launch(*arguments)` starts, specialised as Triton would for its arguments; none of them runs.

    Args:
        name: of the compilations, each followed by the name of its kernel.
        launch: calls launchers on tensors of the meta device, which have shapes and strides but no data.
        arguments: of `launch`.
        requires: of the kernels that `by_kernel` does not name.
        by_kernel: name of a kernel -> what is required of it.
        targets: that the launchers start this on.
    """
    recorded: dict[str, Compilation] = {}  # by fingerprint: a kernel started twice the same way is compiled once

    def record(kernel: Any, grid: object) -> Callable[..., None]:
        def start(*positional: Any, **named: Any) -> None:
            compilation = _specialised(kernel, positional, named)
            recorded.setdefault(compilation.fingerprint(), compilation)

        return start

    with patch.object(KernelInterface, "__getitem__", record):
        launch(*arguments)
    times: Counter[str] = Counter()
    for compilation in recorded.values():
        kernel = compilation.name
        times[kernel] += 1
        number = f" {times[kernel]}" if times[kernel] > 1 else ""
        required = (by_kernel or {}).get(kernel, requires or Requirements())
        yield replace(compilation, name=f"{name}: {kernel}{number}", requires=required, targets=tuple(targets))


def _specialised(kernel: Any, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Compilation:
    """The compilation that `kernel[grid](*positional, **named)` needs by Triton's own rules, named after its kernel."""
    if not isinstance(kernel, JITFunction):  # the interpreter stands in its place
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    bind = create_function_from_signature(inspect.signature(kernel.fn), kernel.params, BaseBackend)
    arguments, specialisations, options = bind(*positional, **named)
    types = dict(zip(arguments, specialisations, strict=True))
    return Compilation(
        name=kernel.fn.__name__,
        kernel=kernel,
        signature={name: type_ for name, (type_, _) in types.items() if type_ != "constexpr"},
        constants={name: getattr(arguments[name], "value", arguments[name]) for name in types if types[name][0] == "constexpr"},
        aligned=frozenset(name for name, (type_, how) in types.items() if type_ != "constexpr" and how == "D"),
        options=options,
    )


def _sources(kernel: Any) -> dict[str, str]:
    """Source of a jit function and of all functions that it reaches outside triton, without comments; {} for other objects."""
    sources: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = getattr(waiting.pop(), "fn", None)
        if not isinstance(function, FunctionType) or function.__module__.startswith("triton."):
            continue
        name = f"{function.__module__}.{function.__qualname__}"
        if name not in sources:
            referenced = dict(_referenced(function))
            plain = sorted(f"{key}={value}" for key, value in referenced.items() if type(value).__name__ == "constexpr")
            sources[name] = "\n".join([_source(function), *plain])
            waiting += referenced.values()
    return sources


@cache
def _source(function: FunctionType) -> str:
    return _without_comments(inspect.getsource(function))


def _referenced(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Names that the function uses from outside it, with their values; `module.name` too."""
    names = inspect.getclosurevars(function)
    for name, value in {**names.globals, **names.nonlocals}.items():
        yield name, value
        if isinstance(value, ModuleType) and not value.__name__.startswith("triton."):
            yield from ((f"{name}.{key}", getattr(value, key)) for key in names.unbound if hasattr(value, key))


def _without_comments(source: str) -> str:
    tokens = tokenize.generate_tokens(io.StringIO(textwrap.dedent(source)).readline)
    return " ".join(token.string for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL))
