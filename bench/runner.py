"""Check, then time providers side by side: rounds interleaved, inputs fresh and rotated, medians with quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench import machine
from bench.case import Case, Prepared, Provider, Tensors

ERROR_FACTOR = 2.0  # ours may err from float64 by this many times what the plain torch operation errs
AGREEMENT = 0.02  # relative, root mean square: two bf16 results of one operation that differ by more are not the same
ROUNDS, LONG_ROUNDS = 15, 3
INPUT_SETS = 3
CACHE_BYTES = 200e6  # inputs of this size do not stay in any last-level cache, so rotating them is not needed
SEED = 1234


def measure(case: Case, seconds: float = 60.0) -> dict[str, Any]:
    """One row of results; providers are timed only where ours is right, for about `seconds` at most."""
    row: dict[str, Any] = {"shape": dict(case.shape), "unit": case.unit, "work": case.work, "facts": case.facts}
    row |= {"flops": case.flops, "bytes": case.bytes, "limits": machine.limits()}
    row["check"] = check(case.check or case)
    if not row["check"]["right"]:
        return row
    generator = torch.Generator(machine.device()).manual_seed(SEED)
    inputs = [case.inputs(generator)]
    size = sum(x.numel() * x.element_size() for x in inputs[0].values())
    inputs += [case.inputs(generator) for _ in range(INPUT_SETS - 1) if size < CACHE_BYTES and not case.long]
    prepared, row["left_out"] = _prepare(case.providers, inputs, warm=not case.long)
    row["disagreement"] = {} if case.long else _disagreement(prepared)
    for name, found in row["disagreement"].items():
        if not found <= AGREEMENT:
            row["left_out"][name] = f"differs from ours by {found:.3g} at this size"
            del prepared[name]
    row |= _time(prepared, seconds, case)
    return row


def check(case: Case) -> dict[str, Any]:
    """Errors from float64 of every provider, root mean square by result, and whether ours passes the rule."""
    if case.exact is None:
        return {"right": True, "errors": {}}
    inputs = case.inputs(torch.Generator(machine.device()).manual_seed(SEED))
    exact = case.exact(inputs)
    prepared, _ = _prepare(case.providers, [inputs])
    errors = {name: _errors(providers[0], exact) for name, providers in prepared.items()}
    ours = next(iter(case.providers))
    judges = [name for name in case.judges if name in errors]
    right = ours in errors and all(
        errors[ours][result] <= ERROR_FACTOR * max(errors[judge].get(result, 0.0) for judge in judges) for result in exact
    )
    return {"right": right, "judges": judges, "errors": errors, "shape": dict(case.shape)}


def _prepare(
    providers: dict[str, Provider] | Any, inputs: list[Tensors], warm: bool = True
) -> tuple[dict[str, list[Prepared]], dict[str, str]]:
    """Each provider with each set of inputs, run once; and why those are left out that cannot."""
    prepared: dict[str, list[Prepared]] = {}
    left_out: dict[str, str] = {}
    for position, (name, provider) in enumerate(providers.items()):
        try:
            prepared[name] = [provider(tensors) for tensors in inputs]
            for one in prepared[name] if warm else ():
                one.run()
            machine.synchronize()
        except (ValueError, ImportError, NotImplementedError, torch.OutOfMemoryError) as reason:
            if position == 0:
                raise
            prepared.pop(name, None)
            left_out[name] = str(reason).strip().splitlines()[0][:200]
    return prepared, left_out


def _errors(provider: Prepared, exact: Tensors) -> dict[str, float]:
    found = provider.results(provider.run())
    differences = {name: found[name].double() - value for name, value in exact.items() if name in found}
    return {name: difference.square().mean().sqrt().item() for name, difference in differences.items()}


def _disagreement(prepared: dict[str, list[Prepared]]) -> dict[str, float]:
    """Of every peer from ours at full size, relative, the worst of its results."""
    ours, *peers = prepared
    reference = prepared[ours][0].results(prepared[ours][0].run())
    found: dict[str, float] = {}
    for peer in peers:
        theirs = prepared[peer][0].results(prepared[peer][0].run())
        pairs = [(theirs[name].float(), value.float()) for name, value in reference.items() if name in theirs]
        found[peer] = max((float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs), default=0.0)
    return found


def _time(prepared: dict[str, list[Prepared]], seconds: float, case: Case) -> dict[str, Any]:
    machine.settle()
    times: dict[str, list[float]] = {name: [] for name in prepared}
    memory = {name: None if case.long else _memory(providers[0]) for name, providers in prepared.items()}
    rounds, fewest = (LONG_ROUNDS, 2) if case.long else (ROUNDS, 5)
    started = time.perf_counter()
    for turn in range(rounds):
        for name, providers in prepared.items():
            times[name].append(_seconds(providers[turn % len(providers)], case.clock))
        if turn + 1 >= fewest and time.perf_counter() - started > seconds:
            break
    ours, *peers = prepared
    ratios = {peer: [theirs / mine for mine, theirs in zip(times[ours], times[peer], strict=True)] for peer in peers}
    return {
        "rounds": len(times[ours]),
        "seconds": {name: statistics.quantiles(values, n=4) for name, values in times.items()},
        "speed_up": {name: statistics.quantiles(values, n=4) for name, values in ratios.items()},
        "memory": memory,
    }


def _seconds(provider: Prepared, clock: Callable[[], float]) -> float:
    if torch.cuda.is_available():
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        provider.run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    started = clock()
    provider.run()
    return clock() - started


def _memory(provider: Prepared) -> int | None:
    """Bytes allocated at the peak of a run beyond what lay there before; known on CUDA alone."""
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    provider.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
