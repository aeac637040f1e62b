"""Learning-rate schedules that a recipe may name, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from sbp_fast.config import TrainConfig
from sbp_fast.registry import Registry

Schedule: TypeAlias = Callable[[TrainConfig, int, int, int], float]
"""(recipe, step, steps, warm-up steps) -> learning rate of a step after the warm-up, as a fraction of the peak."""

SCHEDULES: Registry[Schedule] = Registry("schedule")
"""What `pretrain.schedule` and `synthesizer.schedule` may name."""


def learning_rate(recipe: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of `step` of `steps`: linear warm-up to the peak, then the recipe's schedule."""
    warmup = max(1, round(recipe.warmup_fraction * steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    return recipe.learning_rate * SCHEDULES[recipe.schedule](recipe, step, steps, warmup)


def cosine(recipe: TrainConfig, step: int, steps: int, warmup: int) -> float:
    """Fall along half a cosine from the peak to the final fraction."""
    final = recipe.final_learning_rate_fraction
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def constant(recipe: TrainConfig, step: int, steps: int, warmup: int) -> float:
    """Stay at the peak."""
    return 1.0


def warmup_stable_decay(recipe: TrainConfig, step: int, steps: int, warmup: int) -> float:
    """Stay at the peak, then fall linearly to the final fraction over the last `decay_fraction` of the steps.

    Hu et al. 2024, section 4.2.
    """
    decay = max(1, min(round(recipe.decay_fraction * steps), steps - warmup))
    progress = max(0, step + 1 - (steps - decay)) / decay
    return 1 - (1 - recipe.final_learning_rate_fraction) * progress


SCHEDULES.register("cosine", cosine)
SCHEDULES.register("constant", constant)
SCHEDULES.register("warmup-stable-decay", warmup_stable_decay)
