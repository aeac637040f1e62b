"""The whole configuration of an experiment."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field, model_validator

from sbp_fast.config.arms import ARM_NAME, DEFAULT_ARMS, RESERVED, ArmConfig
from sbp_fast.config.corpus import CorpusConfig
from sbp_fast.config.embed import EmbedConfig
from sbp_fast.config.evaluate import CompareConfig, EvaluateConfig, QualityConfig
from sbp_fast.config.filter import FilterConfig
from sbp_fast.config.model import ModelConfig
from sbp_fast.config.pair import PairConfig
from sbp_fast.config.section import Section
from sbp_fast.config.synthesize import SynthesizeConfig
from sbp_fast.config.train import CheckpointConfig, LogConfig, ParallelConfig, TrainConfig
from sbp_fast.config.validation import ValidationConfig
from sbp_fast.errors import UserError


class RunConfig(Section):
    """The configuration of a run."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
    """ "auto", "cpu" or a torch device; auto takes CUDA where there is one."""
    threads: Annotated[int, Field(ge=0)] = 0
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
    baseline: str = "baseline"
    """Arm that the others are compared with, and whose first model the synthesizer starts from."""
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    validation: ValidationConfig = ValidationConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()
    filter: FilterConfig = FilterConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()
    quality: QualityConfig = QualityConfig()

    @model_validator(mode="after")
    def _check_arms(self) -> RunConfig:
        for name, arm in self.arms.items():
            if not ARM_NAME.fullmatch(name) or name in RESERVED:
                raise ValueError(f"arms.{name}: the name must be lower-case letters, digits and hyphens, and not {RESERVED[0]}")
            try:
                recipe = arm.resolve_recipe(self.pretrain)
            except ValueError as error:
                raise ValueError(f"arms.{name}.{error}") from None
            self._check_selection(f"arms.{name}.recipe", recipe)
        self._check_selection("synthesizer", self.synthesizer)
        baseline = self.arms.get(self.baseline)
        if baseline is None or not baseline.enabled or baseline.synthetic:
            raise ValueError(f"baseline = {self.baseline} must be an enabled arm that reads no synthetic documents")
        return self

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
