"""The whole configuration of an experiment."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from sbp_fast.config.arms import DEFAULT_ARMS, NAME, ArmConfig, Seeds, check_seeds, expand_shares
from sbp_fast.config.changes import change_section
from sbp_fast.config.corpus import CorpusConfig
from sbp_fast.config.embed import EmbedConfig
from sbp_fast.config.evaluate import CompareConfig, EvaluateConfig, QualityConfig
from sbp_fast.config.filter import FilterConfig
from sbp_fast.config.model import ModelConfig
from sbp_fast.config.pair import PairConfig
from sbp_fast.config.section import Processes, Section, Seed
from sbp_fast.config.sources import CHANGED_SECTIONS, DEFAULT_SOURCES, SCRATCH, SourceConfig
from sbp_fast.config.synthesize import NO_SEEDS, SynthesizeConfig
from sbp_fast.config.train import CheckpointConfig, LogConfig, ParallelConfig, TrainConfig
from sbp_fast.config.validation import ValidationConfig
from sbp_fast.errors import UserError


class RunConfig(Section):
    """The configuration of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    """Name of the run, and of its directory in runs/: letters, digits, dots, hyphens and underscores."""
    seed: Seed = 0
    """Seed of everything but the training of arms: which documents are unique or held out, pairs, and what is generated."""
    seeds: Annotated[Seeds, Field(min_length=1)] = (0,)
    """Training seeds of every arm that names none of its own. Arms are compared by their training runs: one run each gives
    figures, and no conclusion."""
    device: str = "auto"
    """ "auto", "cpu" or a torch device; auto takes CUDA where there is one."""
    threads: Processes = 0
    """CPU threads (0: all cores)."""
    corpus: CorpusConfig = CorpusConfig()
    embed: EmbedConfig = EmbedConfig()
    pair: PairConfig = PairConfig()
    model: ModelConfig = ModelConfig()
    pretrain: TrainConfig = TrainConfig()
    """The recipe of every arm, which the arm's own `recipe` changes."""
    synthesizer: TrainConfig = TrainConfig(tokens=250_000, learning_rate=1e-3)
    arms: dict[str, ArmConfig] = Field(
        default_factory=lambda: {name: ArmConfig.model_validate(arm) for name, arm in DEFAULT_ARMS.items()}
    )
    sources: dict[str, SourceConfig] = Field(
        default_factory=lambda: {name: SourceConfig.model_validate(source) for name, source in DEFAULT_SOURCES.items()}
    )
    baseline: str = "baseline"
    """Arm that the others are compared with, and whose first model a synthesizer starts from unless its source says
    otherwise."""
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    validation: ValidationConfig = ValidationConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()
    filter: FilterConfig = FilterConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()
    quality: QualityConfig = QualityConfig()

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: Seeds) -> Seeds:
        return check_seeds(seeds)

    @field_validator("arms", mode="before")
    @classmethod
    def _one_arm_a_share(cls, arms: Any) -> Any:
        return expand_shares(arms) if isinstance(arms, dict) else arms

    @model_validator(mode="after")
    def _check_arms(self) -> RunConfig:
        for name, arm in self.arms.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"arms.{name}: the name must be lower-case letters, digits and hyphens")
            try:
                recipes = arm.resolve_recipes(self.pretrain)
            except ValueError as error:
                raise ValueError(f"arms.{name}.{error}") from None
            for recipe in recipes:
                self._check_selection(f"arms.{name}.recipe", recipe)
            if len({recipe.tokens for recipe in recipes}) > 1:
                raise ValueError(f"arms.{name}.recipe: recipes to choose among must train on the same number of tokens")
            if arm.order == "related" and arm.data == "all":
                raise ValueError(f"arms.{name}: only unique documents are paired, so order = related needs data = unique")
            if arm.synthetic and arm.synthetic not in self.sources:
                known = ", ".join(self.sources)
                raise ValueError(
                    f"arms.{name}.synthetic = {arm.synthetic} is no source; known: {known}, or add a table of that name"
                )
        baseline = self.arms.get(self.baseline)
        if baseline is None or not baseline.enabled or baseline.synthetic:
            raise ValueError(f"baseline = {self.baseline} must be an enabled arm that reads no synthetic documents")
        return self

    @model_validator(mode="after")
    def _check_sources(self) -> RunConfig:
        for name, source in self.sources.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"sources.{name}: the name must be lower-case letters, digits and hyphens")
            try:
                changed = self.with_source(name)
                self._check_selection("synthesizer", changed.synthesizer)
                changed._check_lengths()
            except ValueError as error:
                raise ValueError(f"sources.{name}.{error}") from None
            if source.pairs == "none" and (source.stitched or source.start == SCRATCH or source.pair or source.synthesizer):
                raise ValueError(f"sources.{name}: without pairs there is no synthesizer to tune and no seed to stitch by")
            if source.model and (source.start or source.pairs == "none"):
                raise ValueError(f"sources.{name}: model is what a synthesizer starts from, in place of start")
        return self

    def with_source(self, name: str) -> RunConfig:
        """Return the configuration with the sections that a source changes, for the stages of that source.

        Raises:
            ValueError: an unknown setting, or a value of the wrong type.
        """
        source = self.sources[name]
        changed = {
            section: change_section(getattr(self, section), getattr(source, section), section, section)
            for section in CHANGED_SECTIONS
        }
        if source.pairs == "none":
            changed["synthesize"] = change_section(changed["synthesize"], {"seeds": NO_SEEDS}, "synthesize", "synthesize")
        return self.model_copy(update=changed)

    def seeds_of(self, arm: ArmConfig) -> Seeds:
        """Return the training seeds of an arm: its own, or those of the run."""
        return arm.seeds or self.seeds

    def _check_lengths(self) -> None:
        key = "synthesize.maximum_tokens" if self.synthesize.maximum_tokens else "model.context"
        longest, minimum = self.synthesize.maximum_tokens or self.model.context, self.filter.minimum_tokens
        if minimum > longest:
            raise ValueError(f"filter.minimum_tokens = {minimum} rejects every document: {key} = {longest}")

    def _check_selection(self, name: str, recipe: TrainConfig) -> None:
        if recipe.select == "best" and not self.validation.points:
            raise ValueError(f'{name}.select = "best" needs validation.points, at which the held-out loss is measured')

    @property
    def enabled_arms(self) -> dict[str, ArmConfig]:
        """The arms that a run trains, the baseline first."""
        enabled = {name: arm for name, arm in self.arms.items() if arm.enabled}
        return {self.baseline: enabled.pop(self.baseline), **enabled}


def resolve_threads(config: RunConfig) -> int:
    """Return the number of CPU threads to use: the configured one, or every core that this process may run on."""
    return config.threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def resolve_device(config: RunConfig) -> str:
    """Return the torch device to use: the configured one, or CUDA where there is one, else the CPU.

    Raises:
        UserError: torch does not know the device, or does not find it here.
    """
    import torch  # imported here, since torch takes seconds to load and most commands do not need it to read a configuration

    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device = {config.device}", f"not usable here: {error}", "set it to auto, or to cpu") from None
    return config.device
