"""The lab's runs: every world with every seed goes through the stages of an experiment, each in a directory of its own.

A seed is a world of its own: another truth, other names, other documents and pairs, other synthesizers and models. Intervals
over seeds are therefore about the method in such worlds, not about one corpus.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from sbp_fast.errors import UserError
from sbp_fast.lab.page import RESULTS, write_page
from sbp_fast.lab.results import summarize
from sbp_fast.lab.sweeps import KIND, Sweep
from sbp_fast.lab.world_run import LabRun, run_world
from sbp_fast.lab.worlds import Kind, WorldSettings
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.files import write_json

CORES = 2
"""Worlds that run side by side, each on one core."""


def lab_runs(
    out: Path, seeds: Sequence[int], overrides: Sequence[str] = (), world: dict[str, Any] | None = None
) -> list[LabRun]:
    """Return the runs of all kinds of worlds with all seeds; `world` replaces settings of the worlds."""
    return [
        LabRun(WorldSettings(kind=kind, seed=seed, **(world or {})), out / kind / f"seed-{seed}", tuple(overrides))
        for seed in seeds
        for kind in get_args(Kind)
    ]


def run_lab(
    out: Path,
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    world: dict[str, Any] | None = None,
    *,
    sweeps: Sequence[Sweep] = (),
    processes: int = CORES,
    quiet: bool = False,
) -> Path:
    """Run all worlds with all seeds, `processes` of them side by side, then write `results.json` and the page.

    Args:
        out: directory of all of them.
        seeds: each of which is a world of its own.
        overrides: settings that replace those of the configuration `lab`.
        world: settings that replace those of the worlds.
        sweeps: settings to change, each in worlds of its own beside the others.
        processes: that run worlds.
        quiet: print nothing.

    Returns:
        The path of the page.

    Raises:
        UserError: a seed given twice, an unusable override, or a directory of another run.
    """
    if len(set(seeds)) < len(seeds):
        raise UserError("--seeds", f"{', '.join(map(str, seeds))}: one stands twice", "give each seed once")
    if len({sweep.setting for sweep in sweeps}) < len(sweeps):
        raise UserError("--sweep", "a setting is swept twice", "give all its values at once")
    worlds = lab_runs(out, seeds, overrides, world)
    swept = [sweep.runs(out, seeds, overrides, world or {}) for sweep in sweeps]
    runs = [*worlds, *itertools.chain.from_iterable(swept)]
    figures = dict(zip(runs, LOCAL.run(run_world, [replace(run, quiet=quiet) for run in runs], processes), strict=True))
    confidence = worlds[0].config.compare.confidence
    points = {
        sweep.setting: _points(sweep, [*worlds, *own], figures, confidence) for sweep, own in zip(sweeps, swept, strict=True)
    }
    results = summarize([figures[run] for run in worlds], worlds[0].config, points)
    results["seconds"] = sum(figure["seconds"] for figure in figures.values())
    write_json(out / RESULTS, results)
    return write_page(out)


def _points(
    sweep: Sweep, runs: Sequence[LabRun], figures: Mapping[LabRun, Mapping[str, Any]], confidence: float
) -> list[dict[str, Any]]:
    chosen = [run for run in runs if run.world.kind == KIND]
    return sweep.points(chosen, [figures[run] for run in chosen], confidence)
