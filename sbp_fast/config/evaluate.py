"""How trained models are measured and compared, and how synthetic documents are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sbp_fast.config.section import NO_EFFECT, Count, Section


class EvaluateConfig(Section):
    """What trained models are scored on, beside held-out documents."""

    choices: str | tuple[str, ...] = "auto"
    """Multiple-choice files (JSONL: prompt, choices, answer); "auto" takes the embedded sets with the embedded corpus and
    builds continuation questions from the held-out documents of any other."""
    continuation_questions: Annotated[int, Field(ge=0)] = 300


class CompareConfig(Section):
    """How arms are compared."""

    bootstrap_samples: Count = 2000
    """Resamples of the items that a metric is measured on."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the intervals."""


class QualityConfig(Section):
    """How the quality of synthetic documents is measured."""

    measured_documents: Count = 20_000
    """Documents drawn from the synthetic, the kept and the real ones each to measure quality; the paper's duplicates are those
    among a million. It decides the memory: some 200 bytes for each of their tokens."""
    judged_documents: Count = 200
    """Kept documents looked at one by one: embedded, and shown to the judge where there is one."""
    judge: Literal["none", "endpoint", "local"] = "none"
    """What says whether a document is factual and has to do with its seed: a server that speaks as OpenAI's does, or a Hugging
    Face directory. Without one nothing is said of facts, and relevance is measured by embeddings."""
    judge_model: str = ""
    """The server's name for the model, or the directory."""
    judge_url: Annotated[str, NO_EFFECT] = ""
    """Of the server, up to /chat/completions: http://localhost:8000/v1."""
    judge_key_variable: Annotated[str, NO_EFFECT] = ""
    """The environment variable that holds the server's key ("": none is sent)."""
    judge_requests: Annotated[int, Field(ge=1, le=256), NO_EFFECT] = 8
    """Questions under way at a time."""
    judge_timeout_seconds: Annotated[float, Field(gt=0), NO_EFFECT] = 120.0
    """How long one answer may take; a failed question is asked six times in all."""
