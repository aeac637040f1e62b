"""Candidates of the sweep: launches of one attention kernel that can hold their tiles in registers and shared memory.

`python -m bench.tune.candidates INDEX PROCESSES` compiles every PROCESSES-th of them from INDEX on into Triton's cache, for the
device at hand, without running any.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from sbp_kernels import _tuned
from sbp_kernels._tuned import Configuration, Launch
from sbp_kernels.layout.plan import Tiles, capacities
from torch import Tensor

from bench import machine

HEADS = (64, 8)  # of the goals
TOKENS = 16_384
DTYPE = torch.bfloat16
# "long" or "short", as in the table -> length distribution of bench.length_distributions that stands for it
REPRESENTATIVES = {"long": "lognormal, mean 821", "short": "32 to 224"}
SHARED_BYTES = 227 * 1024  # of a block, at most
MOST_SUMS = 160  # 32-bit numbers that a thread holds for tiles of sums and scores; of its 255 registers addresses need many
STAGES = {"forward": (2, 3, 4), "dq": (1, 2, 3), "dk_dv": (1, 2, 3)}


@dataclass(frozen=True)
class Subject:
    """What one case of the sweep chooses: the launch of a kernel for one width of heads and one kind of documents."""

    kernel: str
    width: int
    distribution: str

    def current(self) -> Configuration:
        """Return the configuration that the package would use on the device at hand."""
        sizes = _tuned.sizes_of_plans(machine.device(), self.width)
        if sizes is None:  # Triton's interpreter
            return _tuned.unlisted(self.width, DTYPE, (16, 16, 16, 16))
        chosen = sizes[_tuned.DISTRIBUTIONS.index(self.distribution)]
        return _tuned.configuration(machine.device(), self.width, DTYPE, chosen)

    def candidates(self) -> dict[str, Configuration]:
        """Return the configurations to try by title, the current one first; they differ in this kernel's launch alone."""
        current = self.current()
        return {title(self.kernel, it): it for it in (current, *_variations(self.kernel, self.width, current))}


def subjects() -> list[Subject]:
    """Return everything that is chosen, what matters most first."""
    if machine.tiny():
        return [Subject(kernel, 16, "long") for kernel in _tuned.KERNELS]
    kinds = itertools.product(("long", "short"), (128, 64))
    return [Subject(kernel, width, distribution) for distribution, width in kinds for kernel in _tuned.KERNELS]


def title(kernel: str, configuration: Configuration) -> str:
    """Return a candidate's name in results."""
    launch: Launch = getattr(configuration, kernel)
    rows = configuration.key_rows if kernel == "dk_dv" else configuration.query_rows
    return f"{rows} x {launch.step}, {launch.warps} warps, {launch.stages} stages"


def _variations(kernel: str, width: int, current: Configuration) -> Iterator[Configuration]:
    if machine.tiny():
        yield with_launch(current, kernel, 32, Launch(16, 4, 1))
        return
    for rows, step, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), STAGES[kernel]):
        # a group of four warps multiplies 64 rows; only the two wide sums of dK/dV may share out their columns too
        if rows >= (8 if kernel == "dk_dv" else 16) * warps and fits(kernel, rows, step, warps, stages, width):
            yield with_launch(current, kernel, rows, Launch(step, warps, stages))


def with_launch(configuration: Configuration, kernel: str, rows: int, launch: Launch) -> Configuration:
    """Return the configuration with another launch of one kernel, whose tiles have `rows` rows.

    The other kernel of the same tiles, which the sweep does not run beside it, takes the same step.
    """
    if kernel == "dk_dv":
        return replace(configuration, key_rows=rows, dk_dv=launch)
    other = "dq" if kernel == "forward" else "forward"
    same: dict[str, Any] = {kernel: launch, other: replace(getattr(configuration, other), step=launch.step)}
    return replace(configuration, query_rows=rows, **same)


def fits(kernel: str, rows: int, step: int, warps: int, stages: int, width: int) -> bool:
    """Whether a launch's sums and scores fit into registers and its tiles of 16-bit numbers into shared memory."""
    sums = {"forward": width + step, "dq": width + 2 * step, "dk_dv": 2 * width + 2 * step}[kernel]
    kept = {"forward": 1, "dq": 2, "dk_dv": 2}[kernel]
    shared = 2 * width * (kept * rows + 2 * stages * step)
    return rows * sums <= MOST_SUMS * 32 * warps and shared <= SHARED_BYTES


def launcher(kernel: str, configuration: Configuration, inputs: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Return a launch of one kernel.

    Args:
        kernel: of `_tuned.KERNELS`.
        configuration: of the launch.
        inputs: q, k, v, dout, out, lse, delta, visible_until and the five tables of a plan for the configuration's tiles.
    """
    from sbp_kernels.attention import launch

    x = inputs
    scale = x["q"].shape[2] ** -0.5
    query_side = x["visible_until"], x["query_tiles"], x["query_runs"]
    key_side = x["visible_until"], x["key_tiles"], x["key_runs"], x["splits"]
    qkv = x["q"], x["k"], x["v"]
    return {
        "forward": lambda: launch.forward(*qkv, *query_side, scale, configuration),
        "dq": lambda: launch.query_gradient(x["dout"], None, *qkv, x["out"], x["lse"], *query_side, scale, configuration),
        "dk_dv": lambda: launch.key_gradients(x["dout"], *qkv, x["lse"], x["delta"], *key_side, scale, configuration),
    }[kernel]


def without_data(subject: Subject, configuration: Configuration) -> dict[str, Tensor]:
    """Return inputs for `launcher` that have shapes alone."""
    heads, key_heads = HEADS

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = capacities(TOKENS, Tiles(*configuration.sizes), may_split=False)
    names = ("query_tiles", "query_runs", "key_tiles", "key_runs", "splits")
    inputs = {name: empty(n, columns) for name, n, columns in zip(names, rows, (6, 2, 6, 2, 4), strict=True)}
    inputs |= {name: empty(TOKENS, heads, subject.width, dtype=DTYPE) for name in ("q", "dout", "out")}
    inputs |= {name: empty(TOKENS, key_heads, subject.width, dtype=DTYPE) for name in ("k", "v")}
    inputs |= {name: empty(heads, TOKENS, dtype=torch.float32) for name in ("lse", "delta")}
    return inputs | {"visible_until": empty(TOKENS)}


def compile_into_cache(kernel: Any, grid: object) -> Callable[..., Any]:
    """Stand for `kernel[grid]`: compile what the launch needs as a launch does, and run nothing."""
    return lambda *arguments, **named: kernel.run(*arguments, grid=(1,), warmup=True, **named)


def compile_all(index: int, processes: int) -> None:
    """Compile every `processes`-th candidate from `index` on; what fails is left to the sweep, which records why."""
    from triton.runtime.jit import KernelInterface

    pairs = [(subject, configuration) for subject in subjects() for configuration in subject.candidates().values()]
    with patch.object(KernelInterface, "__getitem__", compile_into_cache):
        for subject, configuration in pairs[index::processes]:
            try:
                launcher(subject.kernel, configuration, without_data(subject, configuration))()
            except Exception as error:  # noqa: BLE001 compilers raise anything
                print(f"{subject}: {title(subject.kernel, configuration)}: {str(error)[:200]}", file=sys.stderr)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]), int(sys.argv[2]))
