"""Keys of earlier versions: an old key is refused with the new one."""

from __future__ import annotations

RENAMED: dict[str, str] = {
    "joint.maximum_synthetic_share": "arms.sbp.share",
    "joint.minimum_synthetic_share": "arms.sbp.minimum_share",
    "evaluate.bootstrap_samples": "compare.bootstrap_samples",
    "evaluate.confidence": "compare.confidence",
    "evaluate.measured_documents": "quality.measured_documents",
    "evaluate.judged_documents": "quality.judged_documents",
    "evaluate.judge": "quality.judge",
    "evaluate.judge_model": "quality.judge_model",
    "evaluate.judge_url": "quality.judge_url",
    "evaluate.judge_key_variable": "quality.judge_key_variable",
    "evaluate.judge_requests": "quality.judge_requests",
    "evaluate.judge_timeout_seconds": "quality.judge_timeout_seconds",
    "filter.maximum_unsound_characters": "filter.maximum_malformed_characters",
    "model.width": "model.hidden_size",
    "model.key_value_heads": "model.kv_heads",
    "model.head_width": "model.head_dim",
    "model.feed_forward_width": "model.intermediate_size",
    "model.rope_base": "model.rope_theta",
    "model.norm_epsilon": "model.norm_eps",
    "model.query_key_norm": "model.qk_norm",
    "pretrain.warmup_share": "pretrain.warmup_fraction",
    "pretrain.decay_share": "pretrain.decay_fraction",
    "pretrain.final_learning_rate_share": "pretrain.final_learning_rate_fraction",
    "synthesizer.warmup_share": "synthesizer.warmup_fraction",
    "synthesizer.decay_share": "synthesizer.decay_fraction",
    "synthesizer.final_learning_rate_share": "synthesizer.final_learning_rate_fraction",
}
"""Old key -> new key, both as dotted paths; a whole section may be renamed by its name."""
