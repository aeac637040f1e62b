"""The one runner: check a case, then time its providers side by side in interleaved rounds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from bench import machine
from bench.case import Case, Prepared, Provider, Tensors

ERROR_FACTOR = 2.0  # our error from float64 may be this many times that of the plain torch operation
AGREEMENT = 0.02  # relative, root mean square: two bf16 results of one operation that differ by more are not the same
INPUT_SETS = 3
CACHE_BYTES = 200e6  # inputs of this size do not stay in any last-level cache, so there is no need to rotate them
SEED = 1234
TIME_OVER = "the time was over"
# what a provider raises that cannot run here; third-party code fails in all of these ways
FAILURES = (ImportError, ValueError, NotImplementedError, RuntimeError, AttributeError, TypeError)


def _ignore(_: dict[str, Any]) -> None:
    """Save nothing."""


def measure(case: Case, seconds: float = math.inf, save: Callable[[dict[str, Any]], None] = _ignore) -> dict[str, Any]:
    """Check and time a case.

    Args:
        case: what to measure.
        seconds: time left for its rounds, beside the limit of its schedule.
        save: called with the case as measured so far, after each provider that is timed alone, which may take minutes.

    Returns:
        The case as `bench.records` describes it; providers are timed only where the check holds.
    """
    row: dict[str, Any] = {"shape": dict(case.shape), "unit": case.unit, "work": case.work, "statistics": case.statistics}
    row |= {"flops": case.flops, "bytes": case.bytes, "roofline": machine.roofline()}
    row["check"] = check(case)
    if not row["check"]["right"]:
        return row
    ends = time.monotonic() + min(seconds, case.schedule.seconds)
    if not case.schedule.alone:
        return row | _time_together(case, ends)
    for figures in _time_alone(case, ends):
        row |= figures
        save(row)
    return row


def check(case: Case) -> dict[str, Any]:
    """Return whether ours is right, and the errors from float64 of every provider, root mean square by result."""
    if case.verify is not None:
        return case.verify()
    case = case.check or case
    if case.exact is None:
        return {"right": True, "errors": {}}
    inputs = case.inputs(torch.Generator(machine.device()).manual_seed(SEED))
    exact = case.exact(inputs)
    prepared, _ = _prepare(case.providers, [inputs], warm_up=1)
    errors = {name: _errors(providers[0], exact) for name, providers in prepared.items()}
    ours = next(iter(case.providers))
    baselines = [name for name in case.baselines if name in errors]
    right = ours in errors and all(
        errors[ours][result] <= ERROR_FACTOR * max(errors[baseline].get(result, 0.0) for baseline in baselines)
        for result in exact
    )
    return {"right": right, "judges": baselines, "errors": errors, "shape": dict(case.shape)}


def _prepare(
    providers: Mapping[str, Provider], inputs: list[Tensors], warm_up: int
) -> tuple[dict[str, list[Prepared]], dict[str, str]]:
    """Prepare each provider with each set of inputs; return them, and the reasons of those that cannot run.

    Raises:
        Exception: the first provider, which is ours, cannot run.
    """
    prepared: dict[str, list[Prepared]] = {}
    left_out: dict[str, str] = {}
    for position, (name, provider) in enumerate(providers.items()):
        try:
            prepared[name] = [provider(tensors) for tensors in inputs]
            for ready in prepared[name]:
                _warm_up(ready, warm_up)
        except FAILURES as error:
            if position == 0:
                raise
            prepared.pop(name, None)
            left_out[name] = _reason(error)
    return prepared, left_out


def _warm_up(provider: Prepared, runs: int) -> None:
    for _ in range(runs):
        provider.run()
    machine.synchronize()


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _errors(provider: Prepared, exact: Tensors) -> dict[str, float]:
    results = provider.results(provider.run())
    differences = {name: results[name].double() - value for name, value in exact.items() if name in results}
    return {name: difference.square().mean().sqrt().item() for name, difference in differences.items()}


def _disagreement(prepared: dict[str, list[Prepared]]) -> dict[str, float]:
    """Relative difference of every other provider's results from ours at full size, the greatest of its results."""
    ours, *others = prepared
    reference = prepared[ours][0].results(prepared[ours][0].run())
    differences: dict[str, float] = {}
    for name in others:
        results = prepared[name][0].results(prepared[name][0].run())
        both = [(results[key].float(), value.float()) for key, value in reference.items() if key in results]
        differences[name] = max((float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in both), default=0.0)
    return differences


def _time_together(case: Case, ends: float) -> dict[str, Any]:
    """Time providers that are all prepared at once, on inputs that rotate from round to round."""
    schedule = case.schedule
    generator = torch.Generator(machine.device()).manual_seed(SEED)
    inputs = [case.inputs(generator)]
    size = sum(x.numel() * x.element_size() for x in inputs[0].values())
    inputs += [case.inputs(generator) for _ in range(INPUT_SETS - 1) if size < CACHE_BYTES and schedule.warm_up]
    prepared, left_out = _prepare(case.providers, inputs, schedule.warm_up)
    disagreement = _disagreement(prepared) if schedule.warm_up else {}
    for name, difference in disagreement.items():
        if not difference <= AGREEMENT:
            left_out[name] = f"differs from ours by {difference:.3g} at this size"
            del prepared[name]
    machine.settle()
    memory = {name: _memory(providers[0]) if schedule.warm_up else None for name, providers in prepared.items()}
    times: dict[str, list[float]] = {name: [] for name in prepared}
    for turn in range(schedule.rounds):
        if turn >= schedule.min_rounds and time.monotonic() > ends:
            break
        for name, providers in prepared.items():
            times[name] += _runs(providers[turn % len(providers)], case)
    return {"left_out": left_out, "disagreement": disagreement, **_summary(times), "memory": memory}


def _time_alone(case: Case, ends: float) -> Iterator[dict[str, Any]]:
    """Time providers of which one at a time fits into memory, and yield all figures so far after each."""
    schedule, ours = case.schedule, next(iter(case.providers))
    inputs = case.inputs(torch.Generator(machine.device()).manual_seed(SEED))
    times: dict[str, list[float]] = {}
    memory: dict[str, int | None] = {}
    left_out: dict[str, str] = {}
    counted: dict[str, float] = {}

    def figures_so_far() -> dict[str, Any]:
        row = {"left_out": left_out, **_summary(times), "memory": memory, "statistics": {**case.statistics, **counted}}
        return row | {"peak_memory_bytes": memory[ours]}  # `sbp-fast plan` shows it

    for turn in range(schedule.rounds):
        for name, provider in case.providers.items():
            if name in left_out or (turn and name in schedule.once):
                continue
            if time.monotonic() > ends and (turn >= schedule.min_rounds or name != ours):
                if name not in times:
                    left_out[name] = TIME_OVER
                continue
            try:
                seconds, memory[name], figures = _run_alone(provider, inputs, case)
                times.setdefault(name, []).extend(seconds)
                counted |= {f"{name}: {key}": value for key, value in figures.items()}
            except FAILURES as error:
                if name == ours:
                    raise
                left_out[name] = _reason(error)
            machine.release_memory()
            yield figures_so_far()
    yield figures_so_far()


def _run_alone(provider: Provider, inputs: Tensors, case: Case) -> tuple[list[float], int | None, Mapping[str, float]]:
    """Prepare, warm up, time and close; return seconds, the peak of memory in bytes, and the provider's statistics."""
    prepared = provider(inputs)
    try:
        machine.reset_peak_memory()
        _warm_up(prepared, case.schedule.warm_up)
        seconds = _runs(prepared, case)
        peak = machine.peak_memory()
        figures = prepared.statistics(statistics.median(seconds) / case.work) if prepared.statistics else {}
    finally:
        prepared.close()
    return seconds, peak, figures


def _summary(times: dict[str, list[float]]) -> dict[str, Any]:
    ours, *others = times
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


def _runs(provider: Prepared, case: Case) -> list[float]:
    """Seconds of each timed run, for as much work as `case.work` says."""
    return [_seconds(provider, case) for _ in range(case.schedule.repeats)]


def _seconds(provider: Prepared, case: Case) -> float:
    if case.clock is None and torch.cuda.is_available():
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        output = provider.run()
        stop.record()
        stop.synchronize()
        seconds = start.elapsed_time(stop) / 1e3
    else:
        clock = case.clock or time.perf_counter
        started = clock()
        output = provider.run()
        machine.synchronize()
        seconds = clock() - started
    return seconds if provider.work is None else seconds * case.work / provider.work(output)


def _memory(provider: Prepared) -> int | None:
    """Bytes allocated at the peak of a run beyond those allocated before; known on CUDA alone."""
    before = machine.reset_peak_memory()
    if before is None:
        return None
    provider.run()
    peak = machine.peak_memory()
    return None if peak is None else peak - before
