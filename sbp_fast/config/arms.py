"""The arms of an experiment: the models that are trained from scratch and compared, one `[arms.NAME]` table each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sbp_fast.config.changes import change_section
from sbp_fast.config.section import NO_EFFECT, Section, Seed, Share
from sbp_fast.config.train import TrainConfig

Seeds = tuple[Seed, ...]
NAME = re.compile(r"[a-z][a-z0-9-]*")


def check_seeds(seeds: Seeds) -> Seeds:
    """Refuse a training seed that stands twice: two equal runs would count as two.

    Raises:
        ValueError: naming the seeds.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the training seeds {', '.join(map(str, seeds))} are not all different")
    return seeds


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
    order: Literal["shuffled", "related"] = "shuffled"
    """How real documents come together: shuffled, each seen alone; or joined with related ones up to `model.context` tokens,
    all of which a token may see (In-Context Pretraining, arXiv 2310.10638), a control that generates nothing."""
    synthetic: str = ""
    """Source of the synthetic documents that it also reads, each at most once: the name of a table [sources.NAME]; "" reads
    none."""
    share: Share = 0.375
    """Share of the training tokens that is synthetic, less if fewer synthetic tokens are left after the filters. A list makes
    an arm of each; they share the synthetic documents, which are generated once."""
    minimum_share: Annotated[Share, NO_EFFECT] = 0.0
    """Refuse to begin training with a smaller share than this."""
    seeds: Seeds = ()
    """Training seeds: one training run each, with its own initial weights and order of documents (none: the run's `seeds`)."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Settings of [pretrain] that this arm changes. Every combination of listed values, such as `weight_decay = [0.1, 1]`, is
    trained with the first seed; the one with the lowest held-out loss on validation documents is the arm's recipe."""

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: Seeds) -> Seeds:
        return check_seeds(seeds)

    @model_validator(mode="after")
    def _minimum_is_no_more_than_the_share(self) -> ArmConfig:
        if self.minimum_share > self.share:
            raise ValueError(f"minimum_share = {self.minimum_share:g} is above share = {self.share:g}")
        return self

    def recipes(self) -> list[dict[str, Any]]:
        """Return the changes of [pretrain] of every recipe that the arm tries: each combination of the listed values."""
        lists = {name: value if isinstance(value, list) else [value] for name, value in self.recipe.items()}
        return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]

    def resolve_recipes(self, pretrain: TrainConfig) -> list[TrainConfig]:
        """Return every recipe that the arm tries, one unless a setting has a list of values.

        Raises:
            ValueError: an unknown setting, a value of the wrong type, or an empty list.
        """
        if not self.recipes():
            raise ValueError("recipe: a list of values is empty")
        return [change_section(pretrain, changes, "recipe", "pretrain") for changes in self.recipes()]

    def resolve_recipe(self, pretrain: TrainConfig) -> TrainConfig:
        """Return the arm's first recipe; what depends on the number of tokens is the same for all (see `RunConfig`).

        Raises:
            ValueError: an unknown setting, or a value of the wrong type.
        """
        return self.resolve_recipes(pretrain)[0]


def expand_shares(arms: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables with each arm that lists several shares as one arm a share, named after it: "sbp-share-25".

    One of `DEFAULT_ARMS` that lists several stays, disabled: a configuration that is written without it would be read with it.

    Args:
        arms: name -> table as read from TOML, or an `ArmConfig`.
    """
    expanded: dict[str, Any] = {}
    for name, arm in arms.items():
        shares = arm.get("share") if isinstance(arm, dict) else None
        if not isinstance(shares, list | tuple):
            expanded[name] = arm
            continue
        if name in DEFAULT_ARMS:
            expanded[name] = DEFAULT_ARMS[name] | {"enabled": False}
        label = arm.get("label") or resolve_label(name)
        for share in shares:
            percent = f"{100 * share:g}" if isinstance(share, int | float) else str(share)
            key = f"{name}-share-{percent.replace('.', '-')}"
            expanded[key] = arm | {"share": share, "label": f"{label} {percent}%"}
    return expanded


def resolve_label(name: str, label: str = "") -> str:
    """Return what the report calls an arm: its label, or its name as words."""
    return label or name.replace("-", " ").capitalize()
