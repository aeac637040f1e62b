"""What a benchmark is made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """One provider with its inputs ready.

    Attributes:
        run: what is timed.
        results: of what `run` returned, by name and in the layout of `Case.exact`; not timed.
    """

    run: Callable[[], Any]
    results: Callable[[Any], Tensors] = lambda found: found


Provider = Callable[[Tensors], Prepared]


@dataclass(frozen=True)
class Case:
    """One shape of one operation, and the ways to compute it.

    Attributes:
        shape: what a reader needs to know of it.
        inputs: fresh random inputs from a generator on the device.
        providers: the first is ours. One that cannot run raises ValueError or ImportError, and is listed with its reason.
        exact: the results in float64.
        work: units of useful work in one run, for rates; `unit` names them.
        flops, bytes: of useful arithmetic, and of the fewest bytes moved, for the physical limit.
        judges: providers whose errors ours is held against: the same operation as plain torch in the same dtype.
        clock: what times a run on a CPU: seconds by the wall, or `time.process_time` for those of all cores together.
        check: a smaller case of the same operation where `exact` of this one would be too large.
    """

    shape: Mapping[str, Any]
    inputs: Callable[[torch.Generator], Tensors]
    providers: Mapping[str, Provider]
    exact: Callable[[Tensors], Tensors] | None
    work: float
    unit: str
    flops: float = 0.0
    bytes: float = 0.0
    judges: tuple[str, ...] = ()
    check: Case | None = None
    facts: Mapping[str, float] = field(default_factory=dict)  # figures that are counted, not timed; read after the runs
    long: bool = False  # minutes a run: few rounds without a warm-up; its providers judge what they find
    clock: Callable[[], float] = time.perf_counter
    importance: int = 0  # lower runs first where time is short
