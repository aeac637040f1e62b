"""The sources of synthetic documents, which arms read: one `[sources.NAME]` table each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sbp_fast.config.section import NO_EFFECT, Section

SCRATCH = "scratch"
ELSEWHERE = "import:"
"""Begins, in results, what a synthesizer starts from that is no arm: the name of a model pretrained elsewhere follows."""
CHANGED_SECTIONS = ("pair", "synthesizer", "synthesize", "filter")
"""Sections of the run that a source may change for its own stages."""

DEFAULT_SOURCES: dict[str, dict[str, Any]] = {
    "related": {},
    "random": {"pairs": "random"},
    "unconditional": {"pairs": "none"},
    "megadocs": {"stitched": True},
    "round-2": {"start": "sbp"},
}
"""The paper's source (arXiv 2509.15248, section 2), and the controls that its reviewers asked for. TOML adds to these."""


class SourceConfig(Section):
    """A source of synthetic documents: how its synthesizer is made, and what it generates.

    A source is made only if an arm reads it. Sources share every stage that they agree on, so that a source that changes the
    filters alone generates nothing again.
    """

    pairs: Literal["related", "random", "none"] = "related"
    """Pairs that the synthesizer is tuned on: related documents; the same seeds with their partners shuffled, a control; or
    none: the model that `start` names generates documents after no seed, a control that knows no relation."""
    start: str = ""
    """Arm whose first model the synthesizer starts from ("": the run's `baseline`); "scratch" starts from random weights. An
    arm that reads synthetic documents makes this a second round."""
    model: Annotated[str, NO_EFFECT] = ""
    """Hugging Face directory of a model pretrained elsewhere, a dense Qwen3 or Llama, that the synthesizer starts from in place
    of an arm's. `corpus.tokenizer` must be its `tokenizer.json`; its context becomes `model.context`. All arms are trained from
    scratch as ever."""
    stitched: bool = False
    """Join the filtered documents of each seed, up to `model.context` tokens a document (megadocs, arXiv 2603.18534)."""
    pair: dict[str, Any] = Field(default_factory=dict)
    """Settings of [pair] that this source changes."""
    synthesizer: dict[str, Any] = Field(default_factory=dict)
    """Settings of [synthesizer] that this source changes."""
    synthesize: dict[str, Any] = Field(default_factory=dict)
    """Settings of [synthesize] that this source changes."""
    filter: dict[str, Any] = Field(default_factory=dict)
    """Settings of [filter] that this source changes."""
