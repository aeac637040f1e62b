"""The rules that reject a synthetic document, in order of precedence: one registration each.

A rule reads the features of the documents of a shard. The reject reason of a document is the name of the first rule that
rejects it. The manifest's counts, `rejected.parquet` and the report's table follow the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sbp_fast.config import FilterConfig
from sbp_fast.filters.features import Features
from sbp_fast.pipeline.finite import require_finite_rows
from sbp_fast.registry import Registry

Judgement: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Of each document the value that the rule compares with its threshold, and whether the rule rejects it (bool)."""


@dataclass(frozen=True)
class FilterRule:
    """A rule that rejects synthetic documents.

    Attributes:
        threshold: the key of the threshold in `[filter]`, or a constant of the rule's own.
        description: what a rejected document is or has, read beside the threshold.
        judge: judges each document by itself; None for the rule that compares documents with each other.
    """

    threshold: str | float
    description: str
    judge: Callable[[Features, FilterConfig], Judgement] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.threshold, str) and self.threshold not in FilterConfig.model_fields:
            raise ValueError(f"the threshold {self.threshold!r} of a filter rule is no key of [filter]")

    def threshold_in(self, config: FilterConfig) -> float | bool:
        """Return the value of the threshold."""
        return getattr(config, self.threshold) if isinstance(self.threshold, str) else self.threshold


FILTER_RULES = Registry[FilterRule]("filter rule")
"""Rules by reject reason; those that judge a document by itself take precedence in the order of registration."""
JudgeFunction: TypeAlias = Callable[[Features, FilterConfig], Judgement]


def filter_rule(name: str, *, threshold: str | float, description: str) -> Callable[[JudgeFunction], JudgeFunction]:
    """Register the decorated function as the rule `name` (see `FilterRule`).

    Raises:
        ValueError: the name is taken, or `threshold` is no key of `[filter]`.
    """

    def register(judge: JudgeFunction) -> JudgeFunction:
        FILTER_RULES.register(name, FilterRule(threshold, description, judge))
        return judge

    return register


@filter_rule("too_short", threshold="minimum_tokens", description="fewer tokens")
def too_short(features: Features, config: FilterConfig) -> Judgement:
    """Reject short documents, which the other rules cannot judge."""
    return features.tokens, features.tokens < config.minimum_tokens


@filter_rule("unfinished", threshold="keep_unfinished", description="truncated at the maximum length, unless such are kept")
def unfinished(features: Features, config: FilterConfig) -> Judgement:
    """Reject truncated documents, which teach a model not to stop."""
    return features.tokens, (features.stop == "length") & (not config.keep_unfinished)


@filter_rule(
    "repetition",
    threshold="maximum_repeated_shingles",
    description="stopped for repeating itself, or a larger share of its shingles occurs again in it",
)
def repetition(features: Features, config: FilterConfig) -> Judgement:
    """Reject documents that repeat a run of tokens."""
    rejected = (features.stop == "repetition") | (features.repeated_share > config.maximum_repeated_shingles)
    return features.repeated_share, rejected


@filter_rule("compressible", threshold="minimum_compression_ratio", description="zstd leaves a smaller share of its bytes")
def compressible(features: Features, config: FilterConfig) -> Judgement:
    """Reject documents that repeat themselves with small changes."""
    return features.compression_ratio, features.compression_ratio < config.minimum_compression_ratio


@filter_rule(
    "malformed",
    threshold="maximum_malformed_characters",
    description="a larger share of its characters is broken, control, rare or beyond a long run of one character",
)
def malformed(features: Features, config: FilterConfig) -> Judgement:
    """Reject documents with many malformed characters."""
    return features.malformed_ratio, features.malformed_ratio > config.maximum_malformed_characters


@filter_rule("copies_seed", threshold="copy_containment", description="this share of its shingles, or more, occurs in its seed")
def copies_seed(features: Features, config: FilterConfig) -> Judgement:
    """Reject documents that add little to their seed."""
    return features.seed_containment, _reaches(features.seed_containment, config.copy_containment, features, config)


@filter_rule(
    "copies_corpus",
    threshold="copy_containment",
    description="this share of its shingles, or more, occurs in the unique documents",
)
def copies_corpus(features: Features, config: FilterConfig) -> Judgement:
    """Reject memorised text, whatever the seed."""
    return features.corpus_containment, _reaches(features.corpus_containment, config.copy_containment, features, config)


CONTAMINATED = "contaminated"


@filter_rule(
    CONTAMINATED,
    threshold="evaluation_containment",
    description="this share of its shingles, or more, occurs in evaluation texts alone, or it contains a question",
)
def contaminated(features: Features, config: FilterConfig) -> Judgement:
    """Reject documents that leak evaluation texts."""
    value = np.where(features.contains_question, 1.0, features.evaluation_containment)
    return value, features.contains_question | _reaches(value, config.evaluation_containment, features, config)


def _reaches(containment: np.ndarray, limit: float, features: Features, config: FilterConfig) -> np.ndarray:
    """Return whether containments reach a limit, False for documents shorter than a shingle, which have none."""
    return (containment >= limit) & (features.tokens >= config.shingle_tokens)


DUPLICATE = "duplicate"
FILTER_RULES.register(
    DUPLICATE,
    FilterRule("duplicate_similarity", "this similar to an earlier filtered document (Jaccard similarity of shingles)"),
)


def document_rules() -> dict[str, FilterRule]:
    """Return the rules that judge a document by itself, in order of precedence."""
    return {name: rule for name, rule in FILTER_RULES.items() if rule.judge is not None}


def judge_documents(
    features: Features,
    rules: Mapping[str, FilterRule],
    config: FilterConfig,
    name: Callable[[int], str] = lambda row: f"document {row}",
) -> tuple[np.ndarray, np.ndarray]:
    """Return the reject reason of each document, "" where no rule rejects it, and the value that the rule compared.

    Args:
        features: of the documents.
        rules: as `document_rules` returns them.
        config: thresholds.
        name: returns what a document is, for messages.

    Returns:
        str [documents], and float64 [documents], NaN where no rule rejects.

    Raises:
        UserError: a value that a rule compares is not finite, which no threshold would reject.
    """
    judgements = [rule.judge(features, config) for rule in rules.values() if rule.judge is not None]
    values = [value.astype(np.float64) for value, _ in judgements]
    for rule, value in zip(rules, values, strict=True):
        require_finite_rows(value, f"value of the rule {rule}", name)
    rejected: Sequence[np.ndarray] = [rejects for _, rejects in judgements]
    return np.select(rejected, list(rules), default=""), np.select(rejected, values, default=np.nan)


def rules_by_precedence() -> list[tuple[str, FilterRule]]:
    """Return all rules: those that judge a document by itself as registered, then the one that compares documents."""
    return sorted(FILTER_RULES.items(), key=lambda item: item[1].judge is None)


def thresholds(config: FilterConfig) -> dict[str, float | bool]:
    """Return the threshold of every rule, in order of precedence."""
    return {name: rule.threshold_in(config) for name, rule in rules_by_precedence()}


def rule_counts(rejected: Mapping[str, int], documents: int, config: FilterConfig) -> dict[str, dict[str, object]]:
    """Return, for every rule in order of precedence, its threshold, its rejected documents, their share and its description."""
    return {
        name: {
            "threshold": rule.threshold_in(config),
            "rejected": rejected.get(name, 0),
            "share": rejected.get(name, 0) / documents,
            "description": rule.description,
        }
        for name, rule in rules_by_precedence()
    }
