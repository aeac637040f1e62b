"""Keys of earlier versions: an old key is refused with the new one, or with the reason why it is no more."""

from __future__ import annotations

RENAMED: dict[str, str] = {
    "corpus.near_copy_similarity": "corpus.near_duplicate_similarity",
    "joint.maximum_synthetic_share": "arms.sbp.share",
    "joint.minimum_synthetic_share": "arms.sbp.minimum_share",
    "evaluate.confidence": "compare.confidence",
    "evaluate.measured_documents": "quality.measured_documents",
    "evaluate.judged_documents": "quality.judged_documents",
    "evaluate.judge": "quality.judge",
    "evaluate.judge_model": "quality.judge_model",
    "evaluate.judge_url": "quality.judge_url",
    "evaluate.judge_key_variable": "quality.judge_key_variable",
    "evaluate.judge_requests": "quality.judge_requests",
    "evaluate.judge_timeout_seconds": "quality.judge_timeout_seconds",
    "pair.collapse_containment": "pair.duplicate_containment",
    "pair.neighbours": "pair.neighbors",
    "pair.bucket_probes": "pair.nprobe",
    "pair.hnsw_links": "pair.hnsw_m",
    "pair.hnsw_construction": "pair.hnsw_ef_construction",
    "pair.hnsw_search": "pair.hnsw_ef_search",
    "pair.keep_index": "pair.save_index",
    "pair.cell_documents": "pair.partition_documents",
    "pair.cell_overlap": "pair.partition_overlap",
    "pair.near_copy_containment": "pair.near_duplicate_containment",
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
    "filter.maximum_unsound_characters": "filter.maximum_malformed_characters",
}
"""Old key -> new key, both as dotted paths; a whole section may be renamed by its name."""

REMOVED: dict[str, str] = {
    "compare.bootstrap_samples": "remove it: intervals are computed without resampling",
    "evaluate.bootstrap_samples": "remove it: intervals are computed without resampling",
}
"""Old key, a dotted path -> what to do, and why the key is no more."""
