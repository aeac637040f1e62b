"""The rules by which synthetic documents go, each with its threshold in `FilterConfig`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sbp_fast.config import FilterConfig
from sbp_fast.filters.features import Measures

Finding: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Of each document what was measured, and whether it goes."""


def too_short(found: Measures, config: FilterConfig) -> Finding:
    return found.tokens, found.tokens < config.minimum_tokens


def unfinished(found: Measures, config: FilterConfig) -> Finding:
    return found.tokens, (found.stop == "length") & (not config.keep_unfinished)


def repetition(found: Measures, config: FilterConfig) -> Finding:
    return found.repeated, (found.stop == "repetition") | (found.repeated > config.maximum_repeated_shingles)


def compressible(found: Measures, config: FilterConfig) -> Finding:
    return found.compressed, found.compressed < config.minimum_compression_ratio


def malformed(found: Measures, config: FilterConfig) -> Finding:
    return found.unsound, found.unsound > config.maximum_unsound_characters


def copies_seed(found: Measures, config: FilterConfig) -> Finding:
    return found.in_seed, _holds(found.in_seed, config.copy_containment, found, config)


def copies_corpus(found: Measures, config: FilterConfig) -> Finding:
    return found.in_corpus, _holds(found.in_corpus, config.copy_containment, found, config)


def contaminated(found: Measures, config: FilterConfig) -> Finding:
    value = np.where(found.holds_question, 1.0, found.in_evaluation)
    return value, found.holds_question | _holds(value, config.evaluation_containment, found, config)


def _holds(share: np.ndarray, limit: float, found: Measures, config: FilterConfig) -> np.ndarray:
    """A text shorter than a shingle has none to be judged by."""
    return (share >= limit) & (found.tokens >= config.shingle_tokens)


@dataclass(frozen=True)
class Rule:
    """A rule that looks at one document by itself.

    Attributes:
        setting: the key of its threshold.
        what: what is measured, for people.
    """

    find: Callable[[Measures, FilterConfig], Finding]
    setting: str
    what: str


RULES = (
    Rule(too_short, "minimum_tokens", "fewer tokens"),
    Rule(unfinished, "keep_unfinished", "cut off at the longest length, unless such are kept"),
    Rule(repetition, "maximum_repeated_shingles", "stopped as it repeated itself, or more of its shingles occur again"),
    Rule(compressible, "minimum_compression_ratio", "zstd leaves less of its bytes"),
    Rule(malformed, "maximum_unsound_characters", "more of its characters are broken, control, rare or one in a long row"),
    Rule(copies_seed, "copy_containment", "so many of its shingles occur in its seed"),
    Rule(copies_corpus, "copy_containment", "so many of its shingles occur in the unique documents"),
    Rule(
        contaminated,
        "evaluation_containment",
        "so many of its shingles occur in evaluation texts alone, or it holds a question",
    ),
)
"""In the order of precedence: a document is counted under the first that it goes for."""
DUPLICATE = "duplicate"
DUPLICATE_SETTING = "duplicate_similarity"
DUPLICATE_WHAT = "so much like an earlier document that stays (Jaccard similarity of shingles)"


def judge(found: Measures, config: FilterConfig) -> tuple[np.ndarray, np.ndarray]:
    """Why each document goes, "" where it stays so far, and what the rule measured. str [documents], float64 [documents]"""
    names = [rule.find.__name__ for rule in RULES]
    findings = [rule.find(found, config) for rule in RULES]
    taken = [finding[1] for finding in findings]
    reasons = np.select(taken, names, default="")
    return reasons, np.select(taken, [finding[0].astype(np.float64) for finding in findings], default=np.nan)


def rule_counts(rejected: dict[str, int], documents: int, config: FilterConfig) -> dict[str, dict[str, object]]:
    """For every rule, in order, its threshold, how many of the documents it took and their share."""
    settings = {rule.find.__name__: (rule.setting, rule.what) for rule in RULES}
    settings[DUPLICATE] = DUPLICATE_SETTING, DUPLICATE_WHAT
    return {
        name: {
            "threshold": getattr(config, setting),
            "rejected": rejected.get(name, 0),
            "share": rejected.get(name, 0) / documents,
            "what": what,
        }
        for name, (setting, what) in settings.items()
    }
