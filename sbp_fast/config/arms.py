"""The arms of an experiment: the models that are trained from scratch and compared, one `[arms.NAME]` table each."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from sbp_fast.config.section import NO_EFFECT, Section, Share
from sbp_fast.config.train import TrainConfig

ARM_NAME = re.compile(r"[a-z][a-z0-9-]*")
RESERVED = ("synthesizer",)
"""Names of other trained models, whose directories are beside the arms' in a run."""

DEFAULT_ARMS: dict[str, dict[str, Any]] = {
    "baseline": {"label": "Baseline"},
    "sbp": {"label": "SBP", "synthetic": "related"},
    "oracle": {"label": "Oracle", "data": "all"},
}
"""The paper's comparison (arXiv 2509.15248, section 3): repetition, SBP, and more unique text. Tables in TOML add to these."""


class ArmConfig(Section):
    """One arm: what its model reads, by which recipe, and how many times it is trained."""

    enabled: bool = True
    """Whether the run trains this arm; `enabled = false` leaves out one of the default arms."""
    label: Annotated[str, NO_EFFECT] = ""
    """Name shown in the report ("": the name of the table, capitalised)."""
    data: Literal["unique", "all"] = "unique"
    """Real documents it may read: the unique share, or all of them."""
    synthetic: Literal["", "related"] = ""
    """Synthetic documents it also reads, each at most once: "related" were generated after related seeds; "" reads none."""
    share: Share = 0.375
    """Share of the training tokens that is synthetic, less if fewer synthetic tokens are left after the filters."""
    minimum_share: Annotated[Share, NO_EFFECT] = 0.0
    """Refuse to begin training with a smaller share than this."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """Training seeds: one training run each, with its own initial weights and order of documents."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Settings of [pretrain] that this arm changes."""

    def resolve_recipe(self, pretrain: TrainConfig) -> TrainConfig:
        """Return the recipe of [pretrain] with this arm's changes.

        Raises:
            ValueError: an unknown setting, or a value of the wrong type.
        """
        try:
            return TrainConfig.model_validate(pretrain.model_dump() | self.recipe)
        except ValidationError as error:
            first = error.errors()[0]
            setting = ".".join(["recipe", *map(str, first["loc"])])
            if first["type"] == "extra_forbidden":
                near = difflib.get_close_matches(setting.split(".")[1], TrainConfig.model_fields, n=1, cutoff=0.5)
                hint = f": did you mean {near[0]}?" if near else ""
                raise ValueError(f"{setting} is no setting of [pretrain]{hint}") from None
            raise ValueError(f"{setting}: {first['msg'].removeprefix('Value error, ')}") from None


def resolve_label(name: str, arm: ArmConfig) -> str:
    """Return what the report calls an arm."""
    return arm.label or name.replace("-", " ").capitalize()
