"""The whole configuration of an experiment."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field

from sbp_fast.config.corpus import CorpusConfig
from sbp_fast.config.embed import EmbedConfig
from sbp_fast.config.evaluate import EvaluateConfig, QualityConfig
from sbp_fast.config.filter import FilterConfig
from sbp_fast.config.model import ModelConfig
from sbp_fast.config.pair import PairConfig
from sbp_fast.config.section import Section
from sbp_fast.config.synthesize import SynthesizeConfig
from sbp_fast.config.train import CheckpointConfig, JointConfig, LogConfig, ParallelConfig, TrainConfig
from sbp_fast.errors import UserError


class RunConfig(Section):
    """Everything a run depends on."""

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
    """The recipe of the baseline, the joint run and the oracle alike."""
    synthesizer: TrainConfig = TrainConfig(tokens=250_000, learning_rate=1e-3)
    joint: JointConfig = JointConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()
    filter: FilterConfig = FilterConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    quality: QualityConfig = QualityConfig()


def resolve_threads(config: RunConfig) -> int:
    """CPU threads to use: the configured number, or every core this process may run on."""
    return config.threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def resolve_device(config: RunConfig) -> str:
    """The torch device to use: the configured one, or CUDA where there is one, else the CPU.

    Raises:
        UserError: a device that torch does not know or does not find here.
    """
    import torch  # here, because reading a configuration must not take the seconds that torch takes to load

    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device = {config.device}", f"not usable here: {error}", "set it to auto, or to cpu") from None
    return config.device
