"""Every sentence that the report generates, for any outcome: a claim needs an interval over runs that excludes zero."""

import re
from typing import Any

from fabricated_counts import METRICS
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_fast.evaluate.statistics import no_share
from sbp_fast.experiment.report import wording
from sbp_fast.experiment.report.limits import limits
from sbp_fast.experiment.report.summary import summary_table

ARMS = {
    "baseline": {"label": "Baseline", "data": "unique", "synthetic": ""},
    "sbp": {"label": "SBP", "data": "unique", "synthetic": "related"},
    "random-pairs": {"label": "Random pairs", "data": "unique", "synthetic": "random"},
    "baseline-tuned": {"label": "Tuned repeater", "data": "unique", "synthetic": ""},
    "oracle": {"label": "Oracle", "data": "all", "synthetic": ""},
}
CONTROLS = "Beside the controls, SBP "
CLAIMS = re.compile(r"better|worse|improv|gain:", re.IGNORECASE)


@st.composite
def outcomes(draw: Any) -> dict[str, Any]:
    """Results with any differences, one to three runs an arm, and a baseline that repeats its text or does not."""
    values, halves = st.floats(-0.2, 0.2), st.sampled_from([0.0, 0.01, 0.1])
    tokens = {"loss_tokens": 9, "unique_tokens": 700, "unique_tokens_read": 700, "parameters": 1000, "total_flops": 1e12}
    arms: dict[str, Any] = {}
    for name, table in ARMS.items():
        runs, differences = draw(st.integers(1, 3)), {}
        for metric in METRICS:
            own = {"training_runs": runs}
            differences[metric] = _difference(draw(values), draw(halves), own, arms.get("baseline", own))
        scores = {metric: draw(st.floats(0.1, 0.5)) for metric in METRICS}
        arms[name] = (
            table
            | tokens
            | {
                "training_runs": runs,
                "order": "shuffled",
                "recipe": {},
                "recipes_tried": draw(st.sampled_from([1, 3])),
                "tokens": draw(st.sampled_from([1000, 2000])),
                "synthetic_tokens": 300 if table["synthetic"] else 0,
                "real_epochs": draw(st.sampled_from([0.4, 1.0, 1.3, 11.6])),
                "difference_to_baseline": differences if arms else {},
                **{metric: {"value": score, "low": score - 0.04, "high": score + 0.04} for metric, score in scores.items()},
            }
        )
    for name, arm in arms.items():
        arm["difference_to"] = {
            other: {metric: _difference(draw(values), draw(halves), arm, arms[other]) for metric in METRICS}
            for other in arms
            if "baseline" not in (name, other) and other != name
        }
    shares = {arm: {metric: _share(draw, arms, arm, metric) for metric in METRICS} for arm in ("sbp", "random-pairs")}
    return {
        "metrics": METRICS,
        "arms": arms,
        "baseline": "baseline",
        "confidence": 0.95,
        "oracle_ratio": 5.23,
        "corpus": {"embedded": draw(st.booleans())},
        "sources": {
            name: {"pairs_kind": name, "start": "baseline", "stitched": draw(st.booleans()), "synthetic_quality": {}}
            for name in ("related", "random")
        },
        "recovered_share_of_oracle": {"oracle": shares},
    }


def _difference(value: float, half: float, arm: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    runs = [arm["training_runs"], other["training_runs"]]
    known = min(runs) > 1
    return {"value": value, "low": value - half if known else None, "high": value + half if known else None, "runs": runs}


def _share(draw: Any, arms: dict[str, Any], arm: str, metric: str) -> dict[str, Any]:
    gain = arms["oracle"]["difference_to_baseline"][metric]
    repeats = arms["baseline"]["real_epochs"] > 1
    if arms[arm]["training_runs"] == 1 or not repeats or shown_by(gain, metric) != "better":
        return no_share("a reason")
    return {"value": draw(st.floats(-1, 2)), "low": -1.0, "high": 2.0}


def shown_by(difference: dict[str, Any], metric: str) -> str:
    """What an interval over runs shows of an arm: "better", "worse" or nothing."""
    if min(difference["runs"]) == 1 or difference["low"] <= 0 <= difference["high"]:
        return ""
    return "better" if (difference["high"] < 0) == (METRICS[metric]["better"] == "lower") else "worse"


def all_sentences(results: dict[str, Any]) -> list[str]:
    descriptions = wording.arm_descriptions(results)
    return [
        *wording.verdict(results).split("; "),
        *wording.headline(results),
        *(clause for sentence in wording.secondary_sentences(results) for clause in with_metric(sentence)),
        *limits(results),
        *(f"{results['arms'][arm]['label']} {text}" for arm, text in descriptions.items()),
        wording.budget(results),
        *str(summary_table(results).title).split("; "),
    ]


def with_metric(sentence: str) -> list[str]:
    """The clauses of a sentence on a metric, each after the metric's name."""
    metric, _, clauses = sentence.partition(" against the baseline, ")
    return [f"{metric}: {clause}" for clause in clauses.split("; ")]


def metric_of(sentence: str) -> str:
    named = [name for name, metric in METRICS.items() if metric["label"].lower() in sentence.lower()]
    return named[0] if named else "heldout_bits_per_byte"


@settings(deadline=None, max_examples=150)
@given(outcomes())
def test_every_claim_is_about_an_interval_over_runs_that_excludes_zero(results: dict[str, Any]) -> None:
    for sentence in all_sentences(results):
        if not CLAIMS.search(sentence) or sentence.startswith(CONTROLS):
            continue
        name = metric_of(sentence)
        claimed = [arm for arm, table in ARMS.items() if table["label"] in sentence and arm != "baseline"]
        assert claimed, sentence
        for arm in claimed:
            expected = shown_by(results["arms"][arm]["difference_to_baseline"][name], name)
            assert expected, sentence
            if "gain:" not in sentence:
                assert ("worse" in sentence.lower()) == (expected == "worse"), sentence
        if "gain:" in sentence:
            assert shown_by(results["arms"]["oracle"]["difference_to_baseline"][name], name) == "better"


@settings(deadline=None, max_examples=150)
@given(outcomes())
def test_every_arm_is_named_in_the_headline_with_what_it_showed(results: dict[str, Any]) -> None:
    sentences = wording.headline(results)
    for name in wording.other_arms(results):
        arm = results["arms"][name]
        difference = arm["difference_to_baseline"]["heldout_bits_per_byte"]
        figure = f"{arm['label']} {wording.shown_difference(difference, METRICS['heldout_bits_per_byte'])}"
        (sentence,) = [sentence for sentence in sentences if figure in sentence]
        assert ("no conclusion" in sentence.lower()) == (min(difference["runs"]) == 1)


@settings(deadline=None, max_examples=100)
@given(outcomes())
def test_baseline_is_said_to_repeat_only_where_it_read_its_text_more_than_once(results: dict[str, Any]) -> None:
    repeats = results["arms"]["baseline"]["real_epochs"] > 1
    for sentence in all_sentences(results):
        if re.search(r"repetition baseline|repeats", sentence):
            assert repeats, sentence
    assert ("repeats" in wording.arm_descriptions(results)["baseline"]) == repeats


@settings(deadline=None, max_examples=100)
@given(outcomes())
def test_accuracies_at_chance_are_left_out_of_the_sentences(results: dict[str, Any]) -> None:
    shown = " ".join(wording.secondary_sentences(results))
    assert "Capital accuracy, raw" not in shown
    for name, metric in list(wording.main_metrics(METRICS).items())[1:]:
        scores = [results["arms"][arm][name] for arm in ("baseline", "sbp", "random-pairs")]
        at_chance = all(score["low"] <= 0.25 <= score["high"] for score in scores)
        assert (metric["label"] in shown) == (not at_chance)


def description(arm: dict[str, Any], source: dict[str, Any] | None = None) -> str:
    table = {"label": "Mine", "data": "unique", "order": "shuffled", "synthetic": "", "recipes_tried": 1, "recipe": {}}
    results = {"baseline": "baseline", "oracle_ratio": 20.0, "arms": {"sbp": {"label": "SBP"}, "mine": table | arm}}
    results["sources"] = {"mine": {"pairs_kind": "related", "start": "baseline", "stitched": False} | (source or {})}
    return wording._arm_description(results, "mine")


def test_an_arm_is_described_by_what_it_reads_and_how_its_recipe_was_chosen() -> None:
    assert description({"data": "all"}) == "reads a corpus with 20 times as much real text"
    assert description({"order": "related"}) == "reads the same corpus, related documents joined in one context"
    assert description({"recipe": {"weight_decay": 1}}) == "reads the same corpus; its recipe has weight_decay = 1"
    tried = "of 3 recipes the one with the lowest loss on validation documents"
    assert description({"recipes_tried": 3}) == f"reads the same corpus; {tried}"
    reads = "reads the same corpus mixed with new documents, "
    assert description({"synthetic": "mine"}, {"pairs_kind": "none"}) == f"{reads}which a model wrote after no seed"
    again = description({"synthetic": "mine"}, {"start": "sbp", "stitched": True})
    assert again.startswith(f"{reads}written by a synthesizer that learnt")
    assert again.endswith("to another; it starts from the model of SBP; those of one seed are joined")


@settings(deadline=None, max_examples=50)
@given(outcomes())
def test_limits_count_every_difference_with_an_interval_that_the_page_shows(results: dict[str, Any]) -> None:
    arms = {name: arm["training_runs"] for name, arm in results["arms"].items()}
    repeated = [name for name, runs in arms.items() if runs > 1 and name != "baseline"]
    expected = len(METRICS) * len(repeated) * (arms["baseline"] > 1) + len(repeated) * (len(repeated) - 1) // 2
    assert any(f"of the {expected} differences" in limit for limit in limits(results)) == (expected > 0)


@settings(deadline=None, max_examples=150)
@given(outcomes())
def test_every_control_is_named_with_what_the_interval_between_it_and_sbp_shows(results: dict[str, Any]) -> None:
    (sentence,) = [sentence for sentence in wording.headline(results) if sentence.startswith(CONTROLS)]
    clauses = sentence.removeprefix(CONTROLS).split("; it ")
    for control in ("random-pairs", "baseline-tuned"):
        difference = results["arms"]["sbp"]["difference_to"][control]["heldout_bits_per_byte"]
        (clause,) = [clause for clause in clauses if ARMS[control]["label"] in clause]
        shown = {"better": "is better than", "worse": "is worse than"}.get(shown_by(difference, "heldout_bits_per_byte"))
        assert clause.startswith(shown or ("allows no" if min(difference["runs"]) == 1 else "is not told apart from"))
    assert "Oracle" not in sentence
