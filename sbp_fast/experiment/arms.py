"""The arms of a run: their labels, settings and training runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sbp_fast.config import ArmConfig, RunConfig, resolve_label


@dataclass(frozen=True)
class Arm:
    """One arm of a run.

    Attributes:
        name: name of the table [arms.NAME] and of the arm's directories.
        label: name in the report.
        settings: the table.
        runs: name of each training run -> its training seed; the first run has the arm's own name.
        candidates: name of the training run -> changes of [pretrain], for each recipe that the arm chooses among, trained with
            the first seed; empty for an arm of one recipe.
    """

    name: str
    label: str
    settings: ArmConfig
    runs: dict[str, int]
    candidates: dict[str, dict[str, Any]]

    @property
    def recipes_tried(self) -> int:
        """Number of recipes that were trained to choose the arm's own."""
        return max(1, len(self.candidates))


def arms_of(config: RunConfig) -> dict[str, Arm]:
    """Return the enabled arms by name, the baseline first."""
    arms = {}
    for name, settings in config.enabled_arms.items():
        first, *more = config.seeds_of(settings)
        runs = {name: first, **{f"{name}-seed-{seed}": seed for seed in more}}
        recipes = settings.recipes()
        candidates = {f"{name}-{_values(settings, recipe)}": recipe for recipe in recipes} if len(recipes) > 1 else {}
        arms[name] = Arm(name, resolve_label(name, settings.label), settings, runs, candidates)
    return arms


def _values(settings: ArmConfig, recipe: dict[str, Any]) -> str:
    """Return the values that tell a recipe from the arm's others: "weight_decay=0.3"."""
    listed = [name for name, value in settings.recipe.items() if isinstance(value, list)]
    return ",".join(f"{name}={recipe[name]}" for name in listed)
