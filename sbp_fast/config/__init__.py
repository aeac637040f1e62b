"""What a run depends on: frozen models of every setting, with its meaning and default, one section a file.

Each stage is handed its own section and nothing else; `RunConfig` only holds the sections together. TOML has no null,
so "decide for me" is spelled "auto" and zero where a count may be absent; what `auto` became is printed and recorded.
"""

from sbp_fast.config.arms import ArmConfig, resolve_label
from sbp_fast.config.corpus import CorpusConfig
from sbp_fast.config.embed import EmbedConfig
from sbp_fast.config.evaluate import CompareConfig, EvaluateConfig, QualityConfig
from sbp_fast.config.filter import FilterConfig
from sbp_fast.config.model import ModelConfig
from sbp_fast.config.pair import PairConfig
from sbp_fast.config.run import RunConfig, resolve_device, resolve_threads
from sbp_fast.config.section import NO_EFFECT, Section
from sbp_fast.config.synthesize import SynthesizeConfig
from sbp_fast.config.train import AttentionBackend, CheckpointConfig, LogConfig, ParallelConfig, TrainConfig

__all__ = [
    "NO_EFFECT",
    "ArmConfig",
    "AttentionBackend",
    "CheckpointConfig",
    "CompareConfig",
    "CorpusConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "FilterConfig",
    "LogConfig",
    "ModelConfig",
    "PairConfig",
    "ParallelConfig",
    "QualityConfig",
    "RunConfig",
    "Section",
    "SynthesizeConfig",
    "TrainConfig",
    "resolve_device",
    "resolve_label",
    "resolve_threads",
]
