"""The report's sentences about the outcome: what they claim depends on whether the intervals exclude zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sbp_fast.pipeline.progress import short

BITS = "heldout_bits_per_byte"
MINUS = "\N{MINUS SIGN}"
PAPER_RATIO = 19.5  # 20 but for rounding
MATCHED = 0.01  # training tokens of two arms count as the same up to this share


def metric_names(results: Mapping[str, Any]) -> list[str]:
    """The measured metrics, bits per byte first."""
    return [BITS, *(name for name in results["arms"]["baseline"] if name.endswith("_accuracy"))]


def metric_label(metric: str) -> str:
    """What a person calls a metric."""
    if metric == BITS:
        return "Held-out bits per byte"
    return f"{metric.removesuffix('_accuracy').replace('_', ' ').capitalize()} accuracy"


def number(value: float, metric: str, signed: bool = False) -> str:
    """A metric's value, or a difference of two, to the digits that mean something; accuracies in percent."""
    text = f"{value:{'+' if signed else ''}.3f}" if metric == BITS else f"{100 * value:{'+' if signed else ''}.1f}"
    return text.replace("-", MINUS)


def excludes_zero(interval: Mapping[str, Any]) -> bool:
    return interval["low"] > 0 or interval["high"] < 0


def is_better(difference: Mapping[str, Any], metric: str) -> bool:
    """Whether a difference to the baseline is an improvement: fewer bits, more right answers."""
    return (difference["value"] < 0) == (metric == BITS)


def verdict(results: Mapping[str, Any]) -> str:
    """The outcome in one line."""
    difference = results["arms"]["sbp"]["difference_to_baseline"][BITS]
    if not excludes_zero(difference):
        return "SBP made no measurable difference to the repetition baseline in this run"
    return (
        "SBP improved on the repetition baseline in this run"
        if is_better(difference, BITS)
        else "SBP did worse than the repetition baseline in this run"
    )


def headline(results: Mapping[str, Any]) -> list[str]:
    """Two or three sentences that say what was measured on held-out text, with its uncertainty."""
    arms, ratio = results["arms"], results["oracle_ratio"]
    sbp, oracle = (arms[arm]["difference_to_baseline"][BITS] for arm in ("sbp", "oracle"))
    sentences = [
        f"{_change('SBP', sbp)}, against the repetition baseline {budget(results)}.",
        f"{_change(f'The oracle, with {ratio:.3g} times the unique text to draw on,', oracle)}.",
    ]
    recovered = results["recovered_share_of_oracle"].get(BITS)
    if recovered is not None and recovered["value"] is not None:
        value, low, high = (f"{100 * recovered[key]:.0f}%".replace("-", MINUS) for key in ("value", "low", "high"))
        sentences.append(f"SBP's change is {value} [{low}, {high}] of the oracle's gain.")
    elif recovered is not None:
        sentences.append(f"A share of the oracle's gain cannot be given: {recovered['reason']}.")
    sentences.append("One seed each: the intervals are over held-out text, not over the luck of a training run.")
    return sentences


def _change(who: str, difference: Mapping[str, Any]) -> str:
    shown = _shown(difference, BITS)
    if not excludes_zero(difference):
        return f"{who} made no measurable difference to held-out bits per byte ({shown})"
    return f"{who} changed held-out bits per byte by {shown}, {'better' if is_better(difference, BITS) else 'worse'}"


def _shown(difference: Mapping[str, Any], metric: str) -> str:
    value, low, high = (number(difference[key], metric, signed=True) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def budget(results: Mapping[str, Any]) -> str:
    """How the arms' training tokens compare."""
    tokens = [results["arms"][arm]["tokens"] for arm in ("baseline", "sbp", "oracle")]
    if max(tokens) - min(tokens) <= MATCHED * max(tokens):
        return f"at the same {short(tokens[0])} training tokens"
    return f"at unequal training tokens: baseline {short(tokens[0])}, SBP {short(tokens[1])}, oracle {short(tokens[2])}"


def accuracy_sentence(results: Mapping[str, Any], metric: str) -> str:
    """What SBP did to one accuracy."""
    difference = results["arms"]["sbp"]["difference_to_baseline"][metric]
    outcome = "no measurable difference"
    if excludes_zero(difference):
        outcome = "an improvement" if is_better(difference, metric) else "a loss"
    return f"{metric_label(metric)}: {outcome}, SBP against the baseline ({_shown(difference, metric)} points)."


def limits(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing any of it."""
    arms, ratio = results["arms"], results["oracle_ratio"]
    oracle, baseline = arms["oracle"], arms["baseline"]
    embedded = results["corpus"]["embedded"]
    reason = ": in a twentieth of the embedded corpus too few documents would be related" if embedded else ""
    said = [
        f"The models have {short(baseline['parameters'])} parameters. The paper's smallest experiment has 3 billion, and 10 "
        "billion unique tokens, and even there a quarter of the synthesized documents were off their seed's topic: a tiny "
        "model need not show the paper's gain, whatever the code does.",
        f"The oracle may read {ratio:.3g} times the unique text of the other arms"
        + (f", not 20 times as in the paper{reason}." if ratio < PAPER_RATIO else ".")
        + f" At this budget it reads {short(oracle['unique_tokens_read'])} of its {short(oracle['unique_tokens'])} tokens.",
        f"The baseline reads its corpus {baseline['real_epochs']:.3g} times. Text may be repeated about four times at nearly "
        "the worth of fresh text (arXiv 2305.16264)"
        + (": at this budget there is little for SBP to win back." if baseline["real_epochs"] < 4 else "."),
        f"One seed ({results['run']['seed']}) for every training: the intervals are over documents and questions "
        f"({100 * results['confidence']:.3g}% percentile bootstrap, paired between arms), not over trainings.",
        "Arms are matched in the tokens of their final training. What the other stages cost is in the ledger; no baseline was "
        "trained on SBP's total compute.",
    ]
    unmeasured = [
        name.replace("_", "-") for name, found in results["synthetic_quality"]["quality"].items() if found["rate"] is None
    ]
    if unmeasured:
        said.append(
            f"Not measured: {', '.join(unmeasured)}. No judge or reference for it is at hand, and no stand-in is reported."
        )
    return said
