"""The report's sentences about the outcome; their claims depend on whether the intervals exclude zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sbp_fast.pipeline.progress import short

MINUS = "\N{MINUS SIGN}"
PAPER_RATIO = 19.5  # 20, less rounding
MATCHED = 0.01  # training tokens of two arms count as the same up to this share

Results = Mapping[str, Any]
Description = Mapping[str, Any]


def number(value: float, metric: Description, signed: bool = False) -> str:
    """Return a metric's value, or a difference of two, as text with the metric's digits; shares in percent.

    Args:
        value: the number.
        signed: whether a positive number has a plus sign, as differences do.
        metric: the description of the metric, as `Metric.describe` gives it.
    """
    scale = 100 if metric["percent"] else 1
    return f"{scale * value:{'+' if signed else ''}.{metric['digits']}f}".replace("-", MINUS)


def excludes_zero(interval: Mapping[str, Any]) -> bool:
    """Return whether an interval lies on one side of zero."""
    return interval["low"] > 0 or interval["high"] < 0


def is_better(difference: Mapping[str, Any], metric: Description) -> bool:
    """Return whether a difference to the baseline is an improvement."""
    return (difference["value"] < 0) == (metric["better"] == "lower")


def outcome(difference: Mapping[str, Any], metric: Description) -> str:
    """Return "better", "worse", or "unclear" where the interval includes zero."""
    return "unclear" if not excludes_zero(difference) else "better" if is_better(difference, metric) else "worse"


def primary_metric(results: Results) -> str:
    """Return the metric that headlines are about: the first one."""
    return next(iter(results["metrics"]))


def synthetic_arms(results: Results) -> list[str]:
    """Return the arms that read synthetic documents."""
    return [name for name, arm in results["arms"].items() if arm["synthetic"]]


def verdict(results: Results) -> str:
    """Return the outcome in one line, for each arm that reads synthetic documents."""
    metric = primary_metric(results)
    phrases = {
        "unclear": "made no measurable difference to the repetition baseline in this run",
        "better": "improved on the repetition baseline in this run",
        "worse": "did worse than the repetition baseline in this run",
    }
    lines = []
    for name in synthetic_arms(results):
        arm = results["arms"][name]
        lines.append(f"{arm['label']} {phrases[outcome(arm['difference_to_baseline'][metric], results['metrics'][metric])]}")
    return "; ".join(lines) or "No arm of this run reads synthetic documents"


def headline(results: Results) -> list[str]:
    """Return the sentences about the results on held-out text, with their uncertainty."""
    arms, metric = results["arms"], primary_metric(results)
    sentences = [
        f"{_change(_subject(results, name), arm['difference_to_baseline'][metric], results['metrics'][metric])}."
        for name, arm in arms.items()
        if name != results["baseline"]
    ]
    if sentences:
        sentences[0] = f"{sentences[0].removesuffix('.')}, against the repetition baseline {budget(results)}."
    for oracle, by_arm in results["recovered_share_of_oracle"].items():
        sentences += [
            _recovered(arms[name]["label"], arms[oracle]["label"].lower(), by_arm[name][metric])
            for name in synthetic_arms(results)
            if name in by_arm
        ]
    if all(arm["training_runs"] == 1 for arm in arms.values()):
        sentences.append("One seed each: the intervals are over held-out text, not over the luck of a training run.")
    else:
        sentences.append("The intervals are over held-out text, not over the luck of a training run.")
    return sentences


def _subject(results: Results, name: str) -> str:
    arm = results["arms"][name]
    if arm["data"] == "all":
        return f"The {arm['label'].lower()}, with {results['oracle_ratio']:.3g} times the unique text to draw on,"
    return arm["label"]


def _recovered(label: str, oracle: str, share: Mapping[str, Any]) -> str:
    if share["value"] is None:
        return f"A share of the {oracle}'s gain cannot be given: {share['reason']}."
    value, low, high = (f"{100 * share[key]:.0f}%".replace("-", MINUS) for key in ("value", "low", "high"))
    return f"{label}'s change is {value} [{low}, {high}] of the {oracle}'s gain."


def _change(subject: str, difference: Mapping[str, Any], metric: Description) -> str:
    shown, name = _shown(difference, metric), f"{metric['label'][0].lower()}{metric['label'][1:]}"
    if not excludes_zero(difference):
        return f"{subject} made no measurable difference to {name} ({shown})"
    return f"{subject} changed {name} by {shown}, {outcome(difference, metric)}"


def _shown(difference: Mapping[str, Any], metric: Description) -> str:
    value, low, high = (number(difference[key], metric, signed=True) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def budget(results: Results) -> str:
    """Return how the arms' training tokens compare."""
    arms = results["arms"]
    tokens = [arm["tokens"] for arm in arms.values()]
    if max(tokens) - min(tokens) <= MATCHED * max(tokens):
        return f"at the same {short(tokens[0])} training tokens"
    each = ", ".join(f"{_in_a_sentence(arm['label'])} {short(arm['tokens'])}" for arm in arms.values())
    return f"at unequal training tokens: {each}"


def _in_a_sentence(label: str) -> str:
    return label if label.isupper() else f"{label[0].lower()}{label[1:]}"


def secondary_sentences(results: Results) -> list[str]:
    """Return a sentence for each arm with synthetic documents and each metric but the first."""
    phrases = {"unclear": "no measurable difference", "better": "an improvement", "worse": "a loss"}
    sentences = []
    for name, metric in list(results["metrics"].items())[1:]:
        for arm in synthetic_arms(results):
            difference, label = results["arms"][arm]["difference_to_baseline"][name], results["arms"][arm]["label"]
            unit = " points" if metric["percent"] else ""
            sentences.append(
                f"{metric['label']}: {phrases[outcome(difference, metric)]}, {label} against the baseline "
                f"({_shown(difference, metric)}{unit})."
            )
    return sentences


def limits(results: Results) -> list[str]:
    """Return the caveats that a reader must know before trusting the results."""
    arms, ratio = results["arms"], results["oracle_ratio"]
    baseline = arms[results["baseline"]]
    embedded = results["corpus"]["embedded"]
    reason = ": in a twentieth of the embedded corpus too few documents would be related" if embedded else ""
    sentences = [
        f"The models have {short(baseline['parameters'])} parameters. The paper's smallest experiment has 3 billion, and 10 "
        "billion unique tokens, and even there a quarter of the synthesized documents were off their seed's topic: a tiny "
        "model need not show the paper's gain, whatever the code does.",
    ]
    sentences += [
        f"The {arm['label'].lower()} may read {ratio:.3g} times the unique text of the other arms"
        + (f", not 20 times as in the paper{reason}." if ratio < PAPER_RATIO else ".")
        + f" At this budget it reads {short(arm['unique_tokens_read'])} of its {short(arm['unique_tokens'])} tokens."
        for arm in arms.values()
        if arm["data"] == "all"
    ]
    sentences += [
        f"The baseline reads its corpus {baseline['real_epochs']:.3g} times. Text may be repeated about four times at nearly "
        "the worth of fresh text (arXiv 2305.16264)"
        + (": at this budget there is little for SBP to win back." if baseline["real_epochs"] < 4 else "."),
        _seeds(results),
        "Arms are matched in the tokens of their final training. What the other stages cost is in the ledger; no baseline was "
        "trained on the total compute of an arm with synthetic documents.",
    ]
    rates = results["synthetic_quality"]["quality"] if "synthetic_quality" in results else {}
    unmeasured = [rate["label"].lower() for rate in rates.values() if rate["rate"] is None]
    if unmeasured:
        sentences.append(
            f"Not measured: {', '.join(unmeasured)}. No judge or reference for it is at hand, and no stand-in is reported."
        )
    return sentences


def _seeds(results: Results) -> str:
    runs = {arm["label"]: arm["training_runs"] for arm in results["arms"].values()}
    trained = (
        "One training run for each arm"
        if set(runs.values()) == {1}
        else f"Training runs: {', '.join(f'{label} {count}' for label, count in runs.items())}"
    )
    return (
        f"{trained}: the intervals are over documents and questions ({100 * results['confidence']:.3g}% percentile bootstrap, "
        "paired between arms), not over trainings."
    )
