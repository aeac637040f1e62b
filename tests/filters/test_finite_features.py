"""Features that are not finite, which no threshold would reject."""

from dataclasses import replace

import numpy as np
import pytest

from sbp_fast.config import FilterConfig
from sbp_fast.errors import UserError
from sbp_fast.filters.features import Features
from sbp_fast.filters.rules import document_rules, judge_documents

FEATURES = Features(
    tokens=np.array([50, 60, 70]),
    stop=np.array(["end"] * 3),
    repeated_share=np.zeros(3),
    compression_ratio=np.full(3, 0.6),
    malformed_ratio=np.zeros(3),
    seed_containment=np.zeros(3),
    corpus_containment=np.zeros(3),
    evaluation_containment=np.zeros(3),
    contains_question=np.zeros(3, bool),
)


@pytest.mark.parametrize("name", ["repeated_share", "compression_ratio", "malformed_ratio", "corpus_containment"])
def test_feature_that_is_not_finite_is_refused_by_rule_and_document(name: str) -> None:
    rules, config = document_rules(), FilterConfig()
    assert judge_documents(FEATURES, rules, config)[0].tolist() == [""] * 3
    values = getattr(FEATURES, name).copy()
    values[1] = np.nan
    with pytest.raises(UserError, match=r"document 1: its value of the rule .* is not finite"):
        judge_documents(replace(FEATURES, **{name: values}), rules, config)
