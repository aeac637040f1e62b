"""The arms of a run: their labels, settings and training runs."""

from __future__ import annotations

from dataclasses import dataclass

from sbp_fast.config import ArmConfig, RunConfig, resolve_label


@dataclass(frozen=True)
class Arm:
    """One arm of a run.

    Attributes:
        name: name of the table [arms.NAME] and of the arm's directories.
        label: name in the report.
        settings: the table.
        runs: name of each training run -> its training seed; the first run has the arm's own name.
    """

    name: str
    label: str
    settings: ArmConfig
    runs: dict[str, int]


def arms_of(config: RunConfig) -> dict[str, Arm]:
    """Return the enabled arms by name, the baseline first."""
    arms = {}
    for name, settings in config.enabled_arms.items():
        first, *more = settings.seeds
        runs = {name: first, **{f"{name}-seed-{seed}": seed for seed in more}}
        arms[name] = Arm(name, resolve_label(name, settings), settings, runs)
    return arms
