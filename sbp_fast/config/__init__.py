"""The configuration of a run: frozen models of every setting, with its meaning and default, one section a file.

`RunConfig` combines the sections. TOML has no null: "auto" leaves a setting to the program, and zero turns a count off. The
value that "auto" resolves to is printed and recorded.
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
from sbp_fast.config.sources import SourceConfig
from sbp_fast.config.synthesize import SynthesizeConfig
from sbp_fast.config.train import AttentionBackend, CheckpointConfig, LogConfig, ParallelConfig, TrainConfig
from sbp_fast.config.validation import ValidationConfig

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
    "SourceConfig",
    "SynthesizeConfig",
    "TrainConfig",
    "ValidationConfig",
    "resolve_device",
    "resolve_label",
    "resolve_threads",
]
