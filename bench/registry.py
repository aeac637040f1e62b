"""The benchmarks by name, in order of importance. A new benchmark is one call of `register`.

An entry names a function and does not import it, so that a machine with only torch, triton, numpy and numba can list every
benchmark and run those of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from bench.case import Case


@dataclass(frozen=True)
class Benchmark:
    """An entry of the registry.

    Attributes:
        cases: "module:function"; the function returns an iterator of cases, the important ones first. A case may be expensive
            to build and is built only when it is reached.
        table: table of bench/README.md that shows it: "kernels", "data" or "scale"; "" for none.
    """

    cases: str
    table: str = ""

    def load(self) -> Callable[[], Iterator[Case]]:
        """Import the module and return the function.

        Raises:
            ImportError: a package that the module needs is not installed.
        """
        module, function = self.cases.split(":")
        loaded: Callable[[], Iterator[Case]] = getattr(import_module(module), function)
        return loaded


BENCHMARKS: dict[str, Benchmark] = {}


def register(name: str, cases: str, *, table: str = "") -> None:
    """Add a benchmark; the arguments are those of `Benchmark`.

    Raises:
        ValueError: the name is taken.
    """
    if name in BENCHMARKS:
        raise ValueError(f"benchmark {name!r} is registered already, as {BENCHMARKS[name].cases}")
    BENCHMARKS[name] = Benchmark(cases, table)


def benchmark(name: str) -> Benchmark:
    """Return the benchmark of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


register("attention", "bench.attention:attention", table="kernels")
register("generation", "bench.generation:generation", table="kernels")
register("training", "bench.training:training", table="kernels")
register("loss", "bench.loss:loss", table="kernels")
register("small", "bench.small:small", table="kernels")
register("decode-steps", "bench.decode_steps:decode_steps", table="kernels")
register("pairs", "bench.pairs:pairs", table="data")
register("plan", "bench.plan:plan")
register("order", "bench.order:order")
register("steps", "bench.steps:steps", table="steps")
register("short-documents", "bench.short_documents:short_documents", table="kernels")
register("corpus", "bench.corpus:corpus", table="data")
register("scale", "bench.scale:scale", table="scale")
