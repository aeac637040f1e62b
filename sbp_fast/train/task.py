"""What one training run is to compute, apart from the documents that it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sbp_fast.config import RunConfig, TrainConfig
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
        seed: of the initial weights and the order of documents.
        data: real documents that are read: the unique share, or all.
        synthetic: whether synthetic documents are read too, at most `share` of the tokens and at least `minimum_share`.
    """

    name: str
    recipe: TrainConfig
    seed: int
    data: Literal["unique", "all"] = "unique"
    synthetic: bool = False
    share: float = 0.0
    minimum_share: float = 0.0

    def __post_init__(self) -> None:
        check_recipe(self.recipe)

    @property
    def tunes(self) -> bool:
        """Whether a synthesizer is tuned on pairs, and not a model trained from scratch."""
        return self.name == SYNTHESIZER

    @staticmethod
    def of_arm(config: RunConfig, name: str, seed: int | None = None) -> TrainTask:
        """Return the task of an arm, by default with its first training seed.

        Raises:
            UserError: an arm that the configuration does not have.
        """
        if name not in config.arms:
            raise UserError(f"arm {name}", "is unknown", f"known: {', '.join(config.arms)}; or add a table [arms.{name}]")
        arm = config.arms[name]
        return TrainTask(
            name=name,
            recipe=arm.resolve_recipe(config.pretrain),
            seed=arm.seeds[0] if seed is None else seed,
            data=arm.data,
            synthetic=bool(arm.synthetic),
            share=arm.share if arm.synthetic else 0.0,
            minimum_share=arm.minimum_share if arm.synthetic else 0.0,
        )

    @staticmethod
    def of_synthesizer(config: RunConfig) -> TrainTask:
        """Return the task of tuning the synthesizer."""
        return TrainTask(name=SYNTHESIZER, recipe=config.synthesizer, seed=config.seed)
