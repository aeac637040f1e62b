"""Keys of earlier versions: an old key is refused with the new one."""

from __future__ import annotations

RENAMED: dict[str, str] = {
    "corpus.near_copy_similarity": "corpus.near_duplicate_similarity",
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
}
"""Old key -> new key, both as dotted paths; a whole section may be renamed by its name."""
