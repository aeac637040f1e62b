"""Settings of the evaluation of trained models and synthetic documents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sbp_fast.config.section import NO_EFFECT, Count, CountOrZero, Section


class EvaluateConfig(Section):
    """What trained models are scored on, beside test documents."""

    choices: str | tuple[str, ...] = "auto"
    """Multiple-choice files (JSONL: prompt, choices, answer); "auto" takes the embedded sets with the embedded corpus and
    builds continuation questions from the test documents of any other."""
    continuation_questions: CountOrZero = 300
    open_questions: str | tuple[str, ...] = ()
    """Files of open questions (JSONL: prompt, answers), answered by greedy generation and scored by exact match and F1."""
    answer_tokens: Count = 32
    """Most tokens of a generated answer, which also ends at a line end."""


class CompareConfig(Section):
    """How arms are compared."""

    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of each interval by itself."""


class QualityConfig(Section):
    """How the quality of synthetic documents is measured."""

    measured_documents: Count = 20_000
    """Documents sampled from the synthetic, the filtered and the real ones each to measure quality; the paper counts duplicates
    among a million. Memory is about 200 bytes for each of their tokens."""
    judged_documents: Count = 200
    """Filtered documents that are embedded, and shown to the judge if there is one."""
    judge: Literal["none", "endpoint", "local"] = "none"
    """Model that judges whether a document is factual and related to its seed: `endpoint`, an OpenAI-compatible server;
    `local`, a Hugging Face directory. With `none`, factuality is not measured, and relevance is measured by embeddings."""
    judge_model: str = ""
    """The server's name for the model, or the directory."""
    judge_url: Annotated[str, NO_EFFECT] = ""
    """Base URL of the server, without /chat/completions: http://localhost:8000/v1."""
    judge_key_variable: Annotated[str, NO_EFFECT] = ""
    """Environment variable with the server's key ("": no key is sent)."""
    judge_requests: Annotated[int, Field(ge=1, le=256), NO_EFFECT] = 8
    """Requests in flight at a time."""
    judge_timeout_seconds: Annotated[float, Field(gt=0), NO_EFFECT] = 120.0
    """Timeout of one answer; a failed request is tried six times in all."""
