"""What one training run is to compute, apart from the documents that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sbp_fast.config import ArmConfig, RunConfig, TrainConfig
from sbp_fast.config.changes import change_section
from sbp_fast.errors import UserError
from sbp_fast.train.optimizer import OPTIMIZERS
from sbp_fast.train.schedules import SCHEDULES

SYNTHESIZER = "synthesizer"


def check_recipe(recipe: TrainConfig) -> None:
    """Raise a UserError if an optimizer or a learning-rate schedule is not registered."""
    OPTIMIZERS[recipe.optimizer]
    SCHEDULES[recipe.schedule]


@dataclass(frozen=True)
class TrainTask:
    """A recipe with the seed and the mixture of documents that it is applied to.

    Attributes:
        name: the arm's, or "synthesizer".
        recipe: how it is trained.
        seed: of the initial weights and the order of documents.
        data: real documents that are read: the unique share, or all.
        order: whether real documents are read one by one, "shuffled", or joined with related ones, "related".
        synthetic: whether synthetic documents are read too, at most `share` of the tokens and at least `minimum_share`.
        from_scratch: whether a synthesizer starts from random weights, not from a trained model.
    """

    name: str
    recipe: TrainConfig
    seed: int
    data: Literal["unique", "all"] = "unique"
    order: Literal["shuffled", "related"] = "shuffled"
    synthetic: bool = False
    share: float = 0.0
    minimum_share: float = 0.0
    from_scratch: bool = False

    def __post_init__(self) -> None:
        check_recipe(self.recipe)

    @property
    def tunes(self) -> bool:
        """Whether a synthesizer is tuned on pairs, and not a model trained from scratch."""
        return self.name == SYNTHESIZER

    @staticmethod
    def of_arm(config: RunConfig, name: str, seed: int | None = None, recipe: Mapping[str, Any] | None = None) -> TrainTask:
        """Return the task of an arm, by default with its first training seed and its only recipe.

        Args:
            config: of the run.
            name: of the arm.
            seed: training seed.
            recipe: changes of [pretrain], one of `ArmConfig.recipes`, for an arm that has several to choose among.

        Raises:
            UserError: an arm that the configuration does not have; one with several recipes, and none is given.
        """
        if name not in config.arms:
            raise UserError(f"arm {name}", "is unknown", f"known: {', '.join(config.arms)}; or add a table [arms.{name}]")
        arm = config.arms[name]
        if recipe is None and len(arm.recipes()) > 1:
            raise UserError(
                f"arm {name}", "has several recipes", "give one value for each setting, such as " + _example(name, arm)
            )
        return TrainTask(
            name=name,
            recipe=change_section(config.pretrain, arm.recipes()[0] if recipe is None else recipe, "recipe", "pretrain"),
            seed=config.seeds_of(arm)[0] if seed is None else seed,
            data=arm.data,
            order=arm.order,
            synthetic=bool(arm.synthetic),
            share=arm.share if arm.synthetic else 0.0,
            minimum_share=arm.minimum_share if arm.synthetic else 0.0,
        )

    @staticmethod
    def of_synthesizer(config: RunConfig, *, from_scratch: bool = False) -> TrainTask:
        """Return the task of tuning a synthesizer, from a trained model unless `from_scratch`."""
        return TrainTask(name=SYNTHESIZER, recipe=config.synthesizer, seed=config.seed, from_scratch=from_scratch)


def _example(name: str, arm: ArmConfig) -> str:
    setting, value = next((setting, value) for setting, value in arm.recipe.items() if isinstance(value, list))
    return f"arms.{name}.recipe.{setting}={value[0]}"
