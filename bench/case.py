"""Parts of a benchmark: cases, the providers that compute them, and their timing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def no_inputs(_: torch.Generator) -> Tensors:
    """Return no tensors, for cases whose providers hold their own inputs."""
    return {}


def no_results(_: Any) -> Tensors:
    """Return no tensors, for runs whose output is not compared."""
    return {}


def _nothing() -> None:
    """Release nothing."""


@dataclass(frozen=True)
class Prepared:
    """One provider with its inputs ready.

    Attributes:
        run: the call that is timed.
        results: converts the output of `run` into named tensors in the layout of `Case.exact`; not timed.
        work: units of work that a run with this output did, where that differs from `Case.work`.
        statistics: figures from the median seconds for one unit of work, computed after the timed runs.
        close: releases what the provider holds.
    """

    run: Callable[[], Any]
    results: Callable[[Any], Tensors] = lambda output: output
    work: Callable[[Any], float] | None = None
    statistics: Callable[[float], Mapping[str, float]] | None = None
    close: Callable[[], None] = _nothing


Provider = Callable[[Tensors], Prepared]


@dataclass(frozen=True)
class Schedule:
    """Timing of a case's providers: in rounds, each of which times every provider in turn.

    Attributes:
        rounds: at most this many.
        min_rounds: rounds that are run even where the time is over.
        seconds: time for the rounds; the time left of the whole benchmark applies as well.
        warm_up: untimed runs of a provider before its first timed one. Where there are none, results are not compared either.
        repeats: timed runs of a provider in a row, in each round.
        alone: providers do not fit into memory together: each is prepared anew in every round and closed after it.
        once: names of slow providers that are timed in the first round only.
    """

    rounds: int = 15
    min_rounds: int = 5
    seconds: float = 60.0
    warm_up: int = 1
    repeats: int = 1
    alone: bool = False
    once: tuple[str, ...] = ()


MINUTES_A_RUN = Schedule(rounds=3, min_rounds=2, warm_up=0)


@dataclass(frozen=True)
class Case:
    """One shape of one operation, and the providers that compute it.

    Attributes:
        shape: what a reader needs to know of the case.
        inputs: returns fresh random inputs from a generator on the device.
        providers: by name; the first is ours. A provider that cannot run raises, and is recorded with the reason.
        exact: returns the results in float64 for given inputs; None where there are no results to compare.
        work: units of useful work in one run; `unit` names them.
        flops, bytes: useful arithmetic and the fewest bytes moved in one run, for the roofline.
        baselines: providers that bound our error: the same operation as plain torch in the same dtype.
        check: a smaller case of the same operation, checked instead where `exact` of this one would be too large.
        verify: a check that replaces the one against `exact`; returns {"right": bool, "errors": {...}}.
        statistics: figures that are counted, not timed; read after the runs.
        clock: clock of a run, in seconds, such as `time.process_time` for the CPU time of all cores together; None for CUDA
            events on a GPU and the wall clock elsewhere.
        schedule: how the providers are timed.
    """

    shape: Mapping[str, Any]
    inputs: Callable[[torch.Generator], Tensors]
    providers: Mapping[str, Provider]
    exact: Callable[[Tensors], Tensors] | None
    work: float
    unit: str
    flops: float = 0.0
    bytes: float = 0.0
    baselines: tuple[str, ...] = ()
    check: Case | None = None
    verify: Callable[[], dict[str, Any]] | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)
    clock: Callable[[], float] | None = None
    schedule: Schedule = Schedule()
