"""Filter rules registered from outside the package."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fabricated_run import write_run
from tiny_training import QUIET, configure, make_corpus
from written_corpus import fresh_tokens, make_written

from sbp_fast.config import FilterConfig
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.experiment.report.page import write_report
from sbp_fast.filters.features import Features
from sbp_fast.filters.filtering import REJECTED
from sbp_fast.filters.rules import DUPLICATE, FILTER_RULES, FilterRule, Judgement, filter_rule
from sbp_fast.stages.filter import filter_documents

LIMIT = 25
NAME = "longer_than_twenty_five_tokens"


def longer(features: Features, config: FilterConfig) -> Judgement:
    return features.tokens, features.tokens > LIMIT


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FILTER_RULES, "_entries", dict(FILTER_RULES.items()))
    filter_rule(NAME, threshold=LIMIT, description="more tokens than a test likes")(longer)


@pytest.mark.usefixtures("rule")
@pytest.mark.parametrize("threads", [1, 2])  # 2: in worker processes, which do not register the rule themselves
def test_rule_registered_from_outside_rejects_and_is_counted(tmp_path: Path, threads: int) -> None:
    random, corpus = np.random.default_rng(0), make_corpus(tmp_path)
    rows = [(0, fresh_tokens(random, tokens), "length" if tokens == 40 else "end") for tokens in (20, 30, 40, 24)]
    synthetic = make_written(corpus, tmp_path / "synthetic", [*rows, rows[0]])
    config = configure(tmp_path, f"threads={threads}")
    manifest = filter_documents(config, tmp_path / "out", corpus=corpus, synthetic=synthetic, console=QUIET)
    rejected = pq.read_table(tmp_path / "out" / REJECTED).to_pylist()
    reasons = [(row["sample"], row["reason"], row["value"]) for row in rejected]
    assert reasons == [(1, NAME, 30), (2, "unfinished", 40), (4, DUPLICATE, 1)]  # of two rules the first registered
    assert Corpus(tmp_path / "out").column("sample").tolist() == [0, 3]
    counts = manifest.counts["rules"]
    assert list(counts)[-2:] == [NAME, DUPLICATE] and len(counts) == len(FILTER_RULES)
    assert counts[NAME] == {"threshold": 25, "rejected": 1, "share": 0.2, "description": "more tokens than a test likes"}


@pytest.mark.usefixtures("rule")
def test_rule_registered_from_outside_is_a_row_of_the_reports_table(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    text = write_report(run).read_text()
    assert f"<strong>{NAME.replace('_', ' ')}</strong>" in text and "more tokens than a test likes" in text
    assert NAME in json.loads((run / "results.json").read_text())["sources"]["related"]["synthetic_quality"]["rules"]


def test_registering_a_rule_twice_or_with_an_unknown_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="filter rule 'too_short' is registered twice"):
        filter_rule("too_short", threshold=1, description="")(longer)
    with pytest.raises(ValueError, match="filter rule 'duplicate' is registered twice"):
        filter_rule(DUPLICATE, threshold=1, description="")(longer)
    with pytest.raises(ValueError, match=r"threshold 'longest' of a filter rule is no key of \[filter\]"):
        FilterRule("longest", "")


def test_unknown_rule_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"filter rule 'too_long': is unknown; .*too_short, unfinished, .*, duplicate"):
        FILTER_RULES["too_long"]
