"""The one runner: check a case, then time its providers side by side in interleaved rounds.

A provider that raises is left out with the reason, and the others go on. A CUDA error that stays with the process (an illegal
memory access, say) is raised as `DeviceLost`: nothing that runs after it in this process would mean anything.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import machine, timing
from bench.case import Case, Prepared, Provider, Tensors

ERROR_FACTOR = 2.0  # our error from float64 may be this many times that of the plain torch operation
AGREEMENT = 0.02  # relative, root mean square: two bf16 results of one operation that differ by more are not the same
INPUT_SETS = 3
CACHE_BYTES = 200e6  # inputs of this size do not stay in any last-level cache, so there is no need to rotate them
SEED = 1234
TIME_OVER = "the time was over"
REASON_CHARACTERS = 1000

Save = Callable[[dict[str, Any]], None]
Watch = Callable[[str, str], None]


class DeviceLost(Exception):
    """A provider left the CUDA context of this process broken."""

    def __init__(self, provider: str, reason: str) -> None:
        super().__init__(reason)
        self.provider = provider


def _ignore(*_: Any) -> None:
    """Do nothing."""


@dataclass
class Attempts:
    """Steps of the providers of one case, any of which may fail.

    Attributes:
        ours: name of the first provider, without which there is nothing to compare.
        watch: called with provider and step before each step, for a supervisor to know what ended this process.
        left_out: reasons by provider.
    """

    ours: str
    watch: Watch
    left_out: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, step: str) -> Iterator[None]:
        """Record what a provider raises as the reason for leaving it out.

        Raises:
            DeviceLost: the CUDA context is broken from here on.
            Exception: ours failed.
        """
        self.watch(name, step)
        try:
            yield
        except Exception as error:  # third-party code and compilers raise anything
            try:
                machine.synchronize()
            except RuntimeError:
                raise DeviceLost(name, reason_of(error)) from error
            if name == self.ours:
                raise
            self.left_out[name] = reason_of(error)

    def __contains__(self, name: str) -> bool:
        return name in self.left_out


def reason_of(error: BaseException) -> str:
    """Return the text of an error, or its type where it has none."""
    return str(error).strip()[:REASON_CHARACTERS] or type(error).__name__


def measure(
    case: Case,
    seconds: float = math.inf,
    save: Save = _ignore,
    watch: Watch = _ignore,
    left_out: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Check and time a case.

    Args:
        case: what to measure.
        seconds: time left for its rounds, beside the limit of its schedule.
        save: called with the case as measured so far, after each provider that is timed alone, which may take minutes.
        watch: called with provider and step before each step that may end this process.
        left_out: providers that must not run, with the reasons.

    Returns:
        The case as `bench.records` describes it; providers are timed only where the check holds, and where ours or the case
        itself failed, "failed" says why.

    Raises:
        DeviceLost: a provider left the CUDA context of this process broken.
    """
    row = {**described(case), "roofline": machine.roofline()}
    attempts = Attempts(next(iter(case.providers)), watch, dict(left_out or {}))
    try:
        row["check"] = check(case, watch, left_out)
        if not row["check"]["right"]:
            return row
        ends = time.monotonic() + min(seconds, case.schedule.seconds)
        if not case.schedule.alone:
            return row | _time_together(case, ends, attempts)
        for figures in _time_alone(case, ends, attempts):
            row |= figures
            save(row)
    except DeviceLost:
        raise
    except Exception as error:  # noqa: BLE001 inputs, references and kernels raise anything
        row |= failure(reason_of(error), attempts.left_out)
    return row


def described(case: Case) -> dict[str, Any]:
    """Return the keys of a measured case that are known before it is measured."""
    row = {"shape": dict(case.shape), "unit": case.unit, "work": case.work, "statistics": case.statistics}
    return row | {"flops": case.flops, "bytes": case.bytes}


def failure(reason: str, left_out: Mapping[str, str]) -> dict[str, Any]:
    """Return the keys of a case in which ours, or the case itself, failed: nothing in it was compared."""
    return {"check": {"right": False, "errors": {}}, "failed": reason, "left_out": dict(left_out)}


def check(case: Case, watch: Watch = _ignore, left_out: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return whether ours is right, and the errors from float64 of ours in all forms and of the baselines.

    An error is a root mean square by result. Other providers are compared with ours at full size, so they need not be compiled
    for this size too.

    Raises:
        ValueError: no baseline ran, so nothing bounds the error of ours.
        Exception: ours failed.
    """
    if case.verify is not None:
        return case.verify()
    case = case.check or case
    if case.exact is None:
        return {"right": True, "errors": {}}
    attempts = Attempts(next(iter(case.providers)), watch, dict(left_out or {}))
    inputs = case.inputs(torch.Generator(machine.device()).manual_seed(SEED))
    exact = case.exact(inputs)
    errors: dict[str, dict[str, float]] = {}
    bounding = {name: case.providers[name] for name in case.providers if name.startswith("ours") or name in case.baselines}
    for name, providers in _prepare(bounding, [inputs], 1, attempts).items():
        with attempts.step(name, "check"):
            errors[name] = _errors(providers[0], exact)
    baselines = [name for name in case.baselines if name in errors]
    if not baselines:
        raise ValueError(f"no baseline ran: {attempts.left_out}")
    right = all(
        error <= ERROR_FACTOR * max(errors[baseline].get(result, 0.0) for baseline in baselines)
        for result, error in errors[attempts.ours].items()
    )
    right = right and errors[attempts.ours].keys() == exact.keys()
    shape = dict(case.shape)
    return {"right": right, "judges": baselines, "errors": errors, "left_out": attempts.left_out, "shape": shape}


def _prepare(
    providers: Mapping[str, Provider], inputs: list[Tensors], warm_up: int, attempts: Attempts
) -> dict[str, list[Prepared]]:
    """Prepare each provider with each set of inputs and warm it up.

    Raises:
        Exception: ours failed.
    """
    prepared: dict[str, list[Prepared]] = {}
    for name, provider in providers.items():
        if name not in attempts:
            with attempts.step(name, "prepare"):
                ready = [provider(tensors) for tensors in inputs]
                for each in ready:
                    _warm_up(each, warm_up)
                prepared[name] = ready
    return prepared


def _warm_up(provider: Prepared, runs: int) -> None:
    for _ in range(runs):
        provider.run()
    machine.synchronize()


def _errors(provider: Prepared, exact: Tensors) -> dict[str, float]:
    results = provider.results(provider.run())
    differences = {name: results[name].double() - value for name, value in exact.items() if name in results}
    return {name: difference.square().mean().sqrt().item() for name, difference in differences.items()}


def _leave_out_disagreeing(prepared: dict[str, list[Prepared]], attempts: Attempts) -> dict[str, float]:
    """Return the relative difference of every other provider's results from ours at full size, the greatest of its results.

    Providers that differ by more than AGREEMENT are left out.
    """
    differences: dict[str, float] = {}
    with attempts.step(attempts.ours, "compare"):
        reference = prepared[attempts.ours][0].results(prepared[attempts.ours][0].run())
    for name in [name for name in prepared if name != attempts.ours]:
        with attempts.step(name, "compare"):
            results = prepared[name][0].results(prepared[name][0].run())
            both = [(results[key].float(), value.float()) for key, value in reference.items() if key in results]
            difference = max((float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in both), default=0.0)
            differences[name] = difference
            if not difference <= AGREEMENT:
                attempts.left_out[name] = f"differs from ours by {difference:.3g} at this size"
    return differences


def _time_together(case: Case, ends: float, attempts: Attempts) -> dict[str, Any]:
    """Time providers that are all prepared at once, on inputs that rotate from run to run."""
    schedule = case.schedule
    generator = torch.Generator(machine.device()).manual_seed(SEED)
    inputs = [case.inputs(generator)]
    size = sum(x.numel() * x.element_size() for x in inputs[0].values())
    inputs += [case.inputs(generator) for _ in range(INPUT_SETS - 1) if size < CACHE_BYTES and schedule.warm_up]
    prepared = _prepare(case.providers, inputs, schedule.warm_up, attempts)
    disagreement = _leave_out_disagreeing(prepared, attempts) if schedule.warm_up else {}
    machine.settle()
    clocks: dict[str, _Clock] = {}
    memory: dict[str, int | None] = {}
    for name, providers in prepared.items():
        if name not in attempts:
            with attempts.step(name, "memory"):
                memory[name] = _memory(providers[0]) if schedule.warm_up else None
                clocks[name] = _Clock(providers, case)
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for turn in range(schedule.rounds):
        if turn >= schedule.min_rounds and time.monotonic() > ends:
            break
        for name, clock in clocks.items():
            if name not in attempts:
                with attempts.step(name, "time"):
                    times[name] += clock.seconds(turn)
    times = {name: values for name, values in times.items() if name not in attempts}
    late = {name: clocks[name].late for name in times}
    row = {"left_out": attempts.left_out, "disagreement": disagreement, **_summary(times), "memory": memory}
    return row | ({"late_queues": late} if any(clock.pace for clock in clocks.values()) else {})


class _Clock:
    """Timing of one provider of a case, whose runs take its inputs in turn."""

    def __init__(self, providers: Sequence[Prepared], case: Case) -> None:
        self.providers, self.case, self.late = providers, case, 0
        queued = case.clock is None and torch.cuda.is_available()
        self.pace = timing.choose_pace(providers[0].run) if queued else None

    def seconds(self, turn: int) -> list[float]:
        """Return the seconds of each timed run of a round, for as much work as `case.work` says."""
        return [self._seconds(turn) for _ in range(self.case.schedule.repeats)]

    def _seconds(self, turn: int) -> float:
        provider = self.providers[turn % len(self.providers)]
        if self.pace:
            runs = [self.providers[(turn + offset) % len(self.providers)].run for offset in range(len(self.providers))]
            seconds, late, output = timing.queued_seconds(runs, self.pace)
            self.late += late
        else:
            clock = self.case.clock or time.perf_counter
            started = clock()
            output = provider.run()
            seconds = clock() - started
        return seconds if provider.work is None else seconds * self.case.work / provider.work(output)


def _time_alone(case: Case, ends: float, attempts: Attempts) -> Iterator[dict[str, Any]]:
    """Time providers of which one at a time fits into memory, and yield all figures so far after each."""
    schedule, ours = case.schedule, attempts.ours
    inputs = case.inputs(torch.Generator(machine.device()).manual_seed(SEED))
    times: dict[str, list[float]] = {}
    memory: dict[str, int | None] = {}
    counted: dict[str, float] = {}

    def figures_so_far() -> dict[str, Any]:
        row = {"left_out": dict(attempts.left_out), **_summary(times), "memory": memory}
        row |= {"statistics": {**case.statistics, **counted}}
        return row | {"peak_memory_bytes": memory[ours]}  # `sbp-fast plan` shows it

    for turn in range(schedule.rounds):
        for name, provider in case.providers.items():
            if name in attempts or (turn and name in schedule.once):
                continue
            if time.monotonic() > ends and (turn >= schedule.min_rounds or name != ours):
                if name not in times:
                    attempts.left_out[name] = TIME_OVER
                continue
            with attempts.step(name, "run"):
                seconds, memory[name], figures = _run_alone(provider, inputs, case)
                times.setdefault(name, []).extend(seconds)
                counted |= {f"{name}: {key}": value for key, value in figures.items()}
            machine.release_memory()
            yield figures_so_far()
    yield figures_so_far()


def _run_alone(provider: Provider, inputs: Tensors, case: Case) -> tuple[list[float], int | None, Mapping[str, float]]:
    """Prepare, warm up, time and close; return seconds, the peak of memory in bytes, and the provider's statistics."""
    prepared = provider(inputs)
    try:
        machine.reset_peak_memory()
        _warm_up(prepared, case.schedule.warm_up)
        seconds = _Clock([prepared], case).seconds(0)
        peak = machine.peak_memory()
        figures = prepared.statistics(statistics.median(seconds) / case.work) if prepared.statistics else {}
    finally:
        prepared.close()
    return seconds, peak, figures


def _summary(times: dict[str, list[float]]) -> dict[str, Any]:
    ours, *others = times  # ours is timed first, or nothing is
    ratios = {name: [b / a for a, b in zip(times[ours], times[name], strict=False)] for name in others}
    return {
        "rounds": len(times[ours]),
        "seconds": {name: _spread(values) for name, values in times.items()},
        "speed_up": {name: _spread(values) for name, values in ratios.items()},
    }


def _spread(values: list[float]) -> list[float]:
    """Quartiles, or the least, the median and the greatest of fewer than four values."""
    if len(values) < 4:
        return [min(values), statistics.median(values), max(values)]
    return statistics.quantiles(values, n=4)


def _memory(provider: Prepared) -> int | None:
    """Bytes allocated at the peak of a run beyond those allocated before; known on CUDA alone."""
    before = machine.reset_peak_memory()
    if before is None:
        return None
    provider.run()
    peak = machine.peak_memory()
    return None if peak is None else peak - before
