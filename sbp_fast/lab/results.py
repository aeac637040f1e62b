"""`results.json` of the lab: the figures of all worlds and seeds, with intervals over seeds, and what follows from these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbp_fast.config.run import RunConfig
from sbp_fast.evaluate.statistics import ArmScores, run_half_width
from sbp_fast.experiment.arms import arms_of
from sbp_fast.experiment.report.wording import enumerate_names
from sbp_fast.lab.metrics import EXCESS, EXCESS_LINKED
from sbp_fast.lab.worlds import Kind

SBP, TUNED, RELATED = "sbp", "repetition-tuned", "related"
CONTROLS = (TUNED, "random-pairs", "unconditional")
"""Arms that the relation must beat for the claim of the world of two names."""
WITHIN = 0.1
"""How far the synthesizer's conditional loss may exceed the exact one, as a share of it, for the gate to be passed."""
Figures = Sequence[Mapping[str, Any]]


def summarize(figures: Figures, config: RunConfig, sweeps: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the results of the lab.

    Args:
        figures: of each world and seed, as `run_world` returns them.
        config: of the runs, for the labels of the arms and the confidence of the intervals.
        sweeps: the points of each swept setting, as `Sweep.points` returns them.

    Returns:
        `worlds` -> kind -> `bounds` in nats a value over the entropy, `arms` -> arm -> `label`, `excess` and `excess_linked`,
        `differences` of SBP to each control, `synthesizer` and `random_synthesizer` with `conditional`, `exact` and whether
        the gate is `passed`, `samples` of each source, and `ahead`, the controls whose interval lies above that of SBP. An
        interval is {value, low, high, seeds}; `low` and `high` are None for a single seed. `sweeps` as given.
    """
    kinds = dict.fromkeys(figure["world"]["kind"] for figure in figures)
    labels = {arm.name: arm.label for arm in arms_of(config).values()} | {TUNED: "Tuned repetition"}
    confidence = config.compare.confidence
    worlds = {
        kind: _summarize_world([figure for figure in figures if figure["world"]["kind"] == kind], labels, confidence)
        for kind in kinds
    }
    return {"worlds": worlds, "sweeps": dict(sweeps or {}), "confidence": confidence}


def _summarize_world(figures: Figures, labels: Mapping[str, str], confidence: float) -> dict[str, Any]:
    runs: list[dict[str, Any]] = [{**figure["arms"], TUNED: _tuned(figure["arms"])} for figure in figures]
    excess = {arm: [run[arm][EXCESS]["test"] for run in runs] for arm in runs[0]}
    linked = {arm: [run[arm][EXCESS_LINKED]["test"] for run in runs] for arm in runs[0]}
    arms: dict[str, Any] = {
        arm: {
            "label": labels[arm],
            "excess": interval(excess[arm], confidence),
            "excess_linked": interval(linked[arm], confidence),
        }
        for arm in excess
    }
    synthesizers = {
        source: _synthesizer([figure["synthesizers"][source] for figure in figures], confidence)
        for source in figures[0]["synthesizers"]
    }
    high = arms[SBP]["excess"]["high"]
    return {
        "world": {name: value for name, value in figures[0]["world"].items() if name != "seed"},
        "seeds": [figure["world"]["seed"] for figure in figures],
        "bounds": figures[0]["bounds"],
        "arms": arms,
        "differences": {arm: difference(excess[SBP], excess[arm], confidence) for arm in CONTROLS},
        "ahead": [arm for arm in CONTROLS if high is not None and high < arms[arm]["excess"]["low"]],
        "synthesizer": synthesizers[RELATED],
        "random_synthesizer": synthesizers["random"],
        "samples": {source: _mean([figure["samples"][source] for figure in figures]) for source in figures[0]["samples"]},
    }


def _tuned(arms: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the figures of the repetition that does best on validation documents, among the weight decays that were tried."""
    tried = [arm for arm in arms if arm == "baseline" or arm.startswith("repetition-")]
    return arms[min(tried, key=lambda arm: arms[arm][EXCESS]["validation"])]


def _synthesizer(figures: Figures, confidence: float) -> dict[str, Any]:
    conditional, exact = ([figure[name] for figure in figures] for name in ("conditional", "exact"))
    ratio = interval([reached / best for reached, best in zip(conditional, exact, strict=True)], confidence)
    return {
        "conditional": interval(conditional, confidence),
        "exact": interval(exact, confidence),
        "ratio": ratio,
        "passed": bool(ratio["value"] <= 1 + WITHIN),
        "entropy": figures[0]["entropy"],
        "uniform": figures[0]["uniform"],
    }


def interval(values: Sequence[float], confidence: float) -> dict[str, Any]:
    """Return the mean of one value a seed with its t interval over seeds."""
    return _interval([(1, values)], confidence) | {"seeds": [float(value) for value in values]}


def difference(values: Sequence[float], others: Sequence[float], confidence: float) -> dict[str, Any]:
    """Return the mean difference of two arms with its interval over seeds (Welch's, see `evaluate.statistics`)."""
    return _interval([(1, values), (-1, others)], confidence)


def _interval(terms: Sequence[tuple[int, Sequence[float]]], confidence: float) -> dict[str, Any]:
    scores = [(weight, ArmScores(np.array(values, np.float64), np.zeros(1))) for weight, values in terms]
    value = float(sum(weight * arm.value for weight, arm in scores))
    if min(arm.runs for _, arm in scores) < 2:
        return {"value": value, "low": None, "high": None}
    half = float(run_half_width(scores, confidence))
    return {"value": value, "low": value - half, "high": value + half}


def _mean(figures: Figures) -> dict[str, float | None]:
    """Return the mean of each figure over seeds, None where a seed has none."""
    columns = {name: [figure[name] for figure in figures] for name in figures[0]}
    return {name: None if None in values else float(np.mean(values)) for name, values in columns.items()}


def sentences(results: Mapping[str, Any]) -> dict[Kind, str]:
    """Return what each world shows, as its intervals say it."""
    return {kind: _sentence(kind, world) for kind, world in results["worlds"].items()}


def _sentence(kind: Kind, world: Mapping[str, Any]) -> str:
    labels = {arm: world["arms"][arm]["label"] for arm in CONTROLS}
    if len(world["seeds"]) < 2:
        return "One seed: figures, and no conclusion."
    count = f"{len(world['seeds'])} seeds"
    if kind == "two-names":
        ahead = [labels[arm] for arm in CONTROLS if arm in world["ahead"]]
        behind = [labels[arm] for arm in CONTROLS if arm not in world["ahead"]]
        first = f"SBP is ahead of {enumerate_names(ahead)}: the intervals over {count} do not touch." if ahead else ""
        second = f"The intervals of SBP and {enumerate_names(behind)} touch: no conclusion." if behind else ""
        return " ".join(filter(None, [first, second]))
    change = world["differences"]["unconditional"]
    if change["low"] <= 0 <= change["high"]:
        return f"SBP and {labels['unconditional']} are not told apart by {count}: the relation adds nothing that they show."
    better, worse = ("SBP", labels["unconditional"]) if change["high"] < 0 else (labels["unconditional"], "SBP")
    return f"{better} is ahead of {worse} by an interval over {count} that excludes zero."
