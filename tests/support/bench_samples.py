"""Benchmarks of providers that end their process, for the tests of the supervisor; a worker imports this module."""

import os
import sys
from collections.abc import Iterator

import torch

from bench.case import Case, Prepared, Schedule, Tensors


def plain(tensors: Tensors) -> Prepared:
    return Prepared(lambda: {"out": tensors["x"] + 1e-3})


def dies(tensors: Tensors) -> Prepared:
    print("about to die", file=sys.stderr, flush=True)
    os.abort()


def wrong(tensors: Tensors) -> Prepared:
    return Prepared(lambda: {"out": tensors["x"] + 1.0})


def cases() -> Iterator[Case]:
    """Ours with a provider that dies, ours wrong, and ours dying."""
    print("what providers print is no event")
    others = {"plain": plain, "dies": dies}
    for size, providers in (
        (100, {"ours": plain, **others}),
        (200, {"ours": wrong, **others}),
        (300, {"ours": dies, **others}),
    ):
        yield Case(
            {"size": size},
            lambda generator: {"x": torch.randn(100, generator=generator)},
            providers,
            lambda tensors: {"out": tensors["x"].double()},
            work=100,
            unit="numbers",
            baselines=("plain",),
            schedule=Schedule(rounds=2),
        )
