"""Keys of earlier versions: an old key is refused with the new one."""

from __future__ import annotations

RENAMED: dict[str, str] = {
    "evaluate.measured_documents": "quality.measured_documents",
    "evaluate.judged_documents": "quality.judged_documents",
    "evaluate.judge": "quality.judge",
    "evaluate.judge_model": "quality.judge_model",
    "evaluate.judge_url": "quality.judge_url",
    "evaluate.judge_key_variable": "quality.judge_key_variable",
    "evaluate.judge_requests": "quality.judge_requests",
    "evaluate.judge_timeout_seconds": "quality.judge_timeout_seconds",
    "filter.maximum_unsound_characters": "filter.maximum_malformed_characters",
}
"""Old key -> new key, both as dotted paths; a whole section may be renamed by its name."""
