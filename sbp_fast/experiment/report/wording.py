"""The report's sentences about the outcome; a claim needs an interval over training runs that excludes zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sbp_fast.config.sources import ELSEWHERE, SCRATCH
from sbp_fast.pipeline.progress import short

MINUS = "\N{MINUS SIGN}"
MOST_FIGURES = 4  # arms whose figures a sentence of the headline lists
MATCHED = 0.01  # training tokens of two arms count as the same up to this share

Results = Mapping[str, Any]
Description = Mapping[str, Any]
Outcomes = Mapping[tuple[str, str], list[str]]


def number(value: float, metric: Description, signed: bool = False) -> str:
    """Return a metric's value, or a difference of two, as text with the metric's digits; shares in percent.

    Args:
        value: the number.
        signed: whether a positive number has a plus sign, as differences do.
        metric: the description of the metric, as `Metric.describe` gives it.
    """
    scale = 100 if metric["percent"] else 1
    return f"{scale * value:{'+' if signed else ''}.{metric['digits']}f}".replace("-", MINUS)


def has_interval(interval: Mapping[str, Any]) -> bool:
    """Return whether a value comes with an interval; a difference of arms without replication has none."""
    return interval["low"] is not None


def excludes_zero(interval: Mapping[str, Any]) -> bool:
    """Return whether there is an interval and it lies on one side of zero."""
    return has_interval(interval) and (interval["low"] > 0 or interval["high"] < 0)


def at_chance(score: Mapping[str, Any], metric: Description) -> bool:
    """Return whether the interval of an arm's value includes the value expected of guessing."""
    chance = metric["chance"]
    return chance is not None and has_interval(score) and bool(score["low"] <= chance <= score["high"])


def is_better(difference: Mapping[str, Any], metric: Description) -> bool:
    """Return whether a difference to the baseline is an improvement."""
    return (difference["value"] < 0) == (metric["better"] == "lower")


def outcome(difference: Mapping[str, Any], metric: Description) -> str:
    """Return "better", "worse", "unclear" where the interval includes zero, or "unreplicated" where there is none."""
    if not has_interval(difference):
        return "unreplicated"
    return "unclear" if not excludes_zero(difference) else "better" if is_better(difference, metric) else "worse"


def missing_replication(difference: Mapping[str, Any]) -> str:
    """Return why a difference has no interval; "" if it has one."""
    if has_interval(difference):
        return ""
    fewest, most = min(difference["runs"]), max(difference["runs"])
    return "too few items" if fewest > 1 else "one run each" if most == 1 else "a single run of one of the two"


def primary_metric(results: Results) -> str:
    """Return the metric that headlines are about: the first one."""
    return next(iter(results["metrics"]))


def main_metrics(metrics: Mapping[str, Description]) -> dict[str, Description]:
    """Return the metrics that are no variant of another one: those that tables, plots and sentences are about."""
    return {name: metric for name, metric in metrics.items() if "variant_of" not in metric}


def metric_variants(metrics: Mapping[str, Description]) -> dict[str, Description]:
    """Return the other forms of the main metrics, which have a table of their own."""
    return {name: metric for name, metric in metrics.items() if "variant_of" in metric}


def synthetic_arms(results: Results) -> list[str]:
    """Return the arms that read synthetic documents."""
    return [name for name, arm in results["arms"].items() if arm["synthetic"]]


def other_arms(results: Results) -> list[str]:
    """Return the arms that are compared with the baseline."""
    return [name for name in results["arms"] if name != results["baseline"]]


def baseline_name(results: Results) -> str:
    """Return what the baseline is called: a repetition baseline only if it read its text more than once."""
    repeats = results["arms"][results["baseline"]]["real_epochs"] > 1
    return "repetition baseline" if repeats else "baseline"


def outcomes(results: Results, metric: str, arms: Iterable[str]) -> Outcomes:
    """Return the arms of each outcome by a metric; a key holds the outcome and, without an interval, the reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for arm in arms:
        difference = results["arms"][arm]["difference_to_baseline"][metric]
        key = outcome(difference, results["metrics"][metric]), missing_replication(difference)
        groups.setdefault(key, []).append(arm)
    return groups


def shown_source(results: Mapping[str, Any]) -> str | None:
    """Return the source of synthetic documents that the report describes in detail: the first whose quality was measured."""
    return next((name for name, source in results["sources"].items() if "quality" in source["synthetic_quality"]), None)


def verdict(results: Results) -> str:
    """Return the outcome in one line, for the arms that read synthetic documents."""
    baseline, clauses = baseline_name(results), []
    for (kind, reason), arms in outcomes(results, primary_metric(results), synthetic_arms(results)).items():
        labels = enumerate_names(results["arms"][arm]["label"] for arm in arms)
        clauses.append(
            {
                "better": f"{labels} improved on the {baseline} in this run",
                "worse": f"{labels} did worse than the {baseline} in this run",
                "unclear": f"{labels} made no measurable difference to the {baseline} in this run",
                "unreplicated": f"{labels} against the {baseline}: {reason}, no conclusion",
            }[kind]
        )
    return "; ".join(clauses) or "No arm of this run reads synthetic documents"


def headline(results: Results) -> list[str]:
    """Return the sentences about the results on held-out text, with their uncertainty."""
    name = primary_metric(results)
    metric = results["metrics"][name]
    sentences = []
    for (kind, reason), arms in outcomes(results, name, other_arms(results)).items():
        listed = [_figure(results, arm, name) if len(arms) <= MOST_FIGURES else results["arms"][arm]["label"] for arm in arms]
        sentences.append(f"{_sentence_start(kind, reason)} in {in_a_sentence(metric['label'])}: {enumerate_names(listed)}.")
    if sentences:
        sentences[0] = f"{sentences[0].removesuffix('.')}, against the {baseline_name(results)} {budget(results)}."
        sentences += control_sentences(results, name)
        sentences += _shares(results, name)
        sentences.append(_replication(results, name))
    return sentences


def related_arms(results: Results) -> list[str]:
    """Return the arms that read documents which a synthesizer of related pairs wrote."""
    sources = results["sources"]
    return [arm for arm in synthetic_arms(results) if sources[results["arms"][arm]["synthetic"]]["pairs_kind"] == "related"]


def control_sentences(results: Results, metric: str) -> list[str]:
    """Return how the arms that use the relation compare with those that lack it, by intervals that exclude zero or not.

    The baseline has sentences of its own, and more real text is no control.
    """
    sentences, related = [], related_arms(results)
    controls = [arm for arm in other_arms(results) if arm not in related and results["arms"][arm]["data"] == "unique"]
    for arm in related:
        differences = {control: results["arms"][arm]["difference_to"][control][metric] for control in controls}
        groups: dict[str, list[str]] = {}
        for control, difference in differences.items():
            shown = f"{results['arms'][control]['label']} ({shown_difference(difference, results['metrics'][metric])})"
            groups.setdefault(outcome(difference, results["metrics"][metric]), []).append(shown)
        clauses = [CONTROL_CLAUSES[kind].format(enumerate_names(shown)) for kind, shown in groups.items()]
        if clauses:
            sentences.append(f"Beside the controls, {results['arms'][arm]['label']} {'; it '.join(clauses)}.")
    return sentences


CONTROL_CLAUSES = {
    "better": "is better than {}",
    "worse": "is worse than {}",
    "unclear": "is not told apart from {}",
    "unreplicated": "allows no conclusion about {}",
}


def _sentence_start(kind: str, reason: str) -> str:
    starts = {"better": "Better", "worse": "Worse", "unclear": "No measurable difference"}
    return starts.get(kind, f"No conclusion ({reason})")


def _figure(results: Results, arm: str, metric: str) -> str:
    entry = results["arms"][arm]
    return f"{entry['label']} {shown_difference(entry['difference_to_baseline'][metric], results['metrics'][metric])}"


def shown_difference(difference: Mapping[str, Any], metric: Description) -> str:
    """Return a difference as text, with its interval if it has one."""
    value = number(difference["value"], metric, signed=True)
    if not has_interval(difference):
        return value
    return f"{value} [{number(difference['low'], metric, signed=True)}, {number(difference['high'], metric, signed=True)}]"


def shown_score(score: Mapping[str, Any], metric: Description) -> str:
    """Return an arm's value as text, with its interval if it has one."""
    value = number(score["value"], metric)
    return f"{value} [{number(score['low'], metric)}, {number(score['high'], metric)}]" if has_interval(score) else value


def _shares(results: Results, metric: str) -> list[str]:
    """Return the shares of each oracle's gain, of the arms with synthetic documents whose difference excludes zero."""
    arms, sentences = results["arms"], []
    for oracle, by_arm in results["recovered_share_of_oracle"].items():
        shares = {
            arm: by_arm[arm][metric]
            for arm in synthetic_arms(results)
            if arm in by_arm and excludes_zero(arms[arm]["difference_to_baseline"][metric])
        }
        given = [f"{arms[arm]['label']} {_percents(share)}" for arm, share in shares.items() if share["value"] is not None]
        if given:
            sentences.append(f"As a share of the {in_a_sentence(arms[oracle]['label'])}'s gain: {enumerate_names(given)}.")
    return sentences


def missing_shares(by_arm: Mapping[str, Any], metrics: Iterable[str]) -> list[str]:
    """Return the reasons why no arm has a share of an oracle's gain by any of some metrics; an empty list if one has."""
    shares = [by_metric[metric] for metric in metrics for by_metric in by_arm.values()]
    if any(share["value"] is not None for share in shares):
        return []
    return list(dict.fromkeys(share["reason"] for share in shares))


def _percents(share: Mapping[str, Any]) -> str:
    value, low, high = (f"{100 * share[key]:.0f}%".replace("-", MINUS) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _replication(results: Results, metric: str) -> str:
    """Return what the intervals of the headline are over."""
    differences = [results["arms"][arm]["difference_to_baseline"][metric] for arm in other_arms(results)]
    if not any(map(has_interval, differences)):
        return "Without a second training run of each arm, the luck of a training run is unknown."
    return f"Brackets are intervals over training runs ({run_counts(results)}) and held-out text together."


def run_counts(results: Results) -> str:
    """Return the number of training runs of an arm, or of each arm where these differ."""
    arms = results["arms"].values()
    counts = {arm["training_runs"] for arm in arms}
    if len(counts) == 1:
        return f"{counts.pop()} an arm"
    return ", ".join(f"{in_a_sentence(arm['label'])} {arm['training_runs']}" for arm in arms)


def budget(results: Results) -> str:
    """Return how the arms' training tokens compare."""
    arms = results["arms"]
    tokens = [arm["tokens"] for arm in arms.values()]
    if max(tokens) - min(tokens) <= MATCHED * max(tokens):
        return f"at the same {short(tokens[0])} training tokens"
    each = ", ".join(f"{in_a_sentence(arm['label'])} {short(arm['tokens'])}" for arm in arms.values())
    return f"at unequal training tokens: {each}"


def secondary_sentences(results: Results) -> list[str]:
    """Return a sentence on the arms with synthetic documents for each main metric but the first, unless all are at chance."""
    sentences = []
    for name, metric in list(main_metrics(results["metrics"]).items())[1:]:
        arms = synthetic_arms(results)
        if not arms or all(at_chance(results["arms"][arm][name], metric) for arm in (results["baseline"], *arms)):
            continue
        unit = " points" if metric["percent"] else ""
        clauses = [
            f"{_sentence_start(*key).lower()}: {enumerate_names(_figure(results, arm, name) + unit for arm in members)}"
            for key, members in outcomes(results, name, arms).items()
        ]
        sentences.append(f"{metric['label']} against the baseline, {'; '.join(clauses)}.")
    return sentences


def arm_descriptions(results: Results) -> dict[str, str]:
    """Return what each arm's model read, to follow its label."""
    return {name: _arm_description(results, name) for name in results["arms"]}


WRITERS = {
    "related": "new documents, written by a synthesizer that learnt from the baseline's corpus alone how one document "
    "relates to another",
    "random": "new documents, written by a synthesizer that was tuned on the same seeds with unrelated partners",
    "none": "new documents, which a model wrote after no seed",
}
"""Kind of pairs -> description of the documents of a source."""


def _arm_description(results: Results, name: str) -> str:
    arm = results["arms"][name]
    if name == results["baseline"]:
        tokens = f"a corpus of {short(arm['unique_tokens'])} tokens"
        return f"repeats {tokens}, {arm['real_epochs']:.3g} times" if arm["real_epochs"] > 1 else f"reads {tokens} once at most"
    text = "reads the same corpus"
    if arm["data"] == "all":
        text = f"reads a corpus with {results['oracle_ratio']:.3g} times as much real text"
    if arm["order"] == "related":
        text += ", related documents joined in one context"
    if arm["synthetic"]:
        text += f" mixed with {_source_description(results, arm['synthetic'])}"
    if arm["recipes_tried"] > 1:
        text += f"; of {arm['recipes_tried']} recipes the one with the lowest loss on validation documents"
    elif arm["recipe"]:
        text += f"; its recipe has {', '.join(f'{name} = {value}' for name, value in arm['recipe'].items())}"
    return text


def starts_elsewhere(results: Results, name: str) -> bool:
    """Return whether the synthesizer of a source starts from a model pretrained elsewhere."""
    return bool(results["sources"][name]["start"].startswith(ELSEWHERE))


def start_of(results: Results, name: str) -> str:
    """Return what the synthesizer of a source starts from."""
    start = results["sources"][name]["start"]
    if starts_elsewhere(results, name):
        return f"{start.removeprefix(ELSEWHERE)}, a model pretrained elsewhere"
    return "random weights" if start == SCRATCH else f"the model of {results['arms'][start]['label']}"


def source_descriptions(results: Results) -> dict[str, str]:
    """Return what the documents of each source are."""
    return {name: _source_description(results, name) for name in results["sources"]}


def _source_description(results: Results, name: str) -> str:
    source = results["sources"][name]
    text = WRITERS[source["pairs_kind"]]
    if source["start"] != results["baseline"]:
        text += f"; it starts from {start_of(results, name)}"
    return f"{text}; those of one seed are joined" if source["stitched"] else text


def in_a_sentence(label: str) -> str:
    """Return the label of an arm as it stands within a sentence."""
    return label if label.isupper() else f"{label[0].lower()}{label[1:]}"


def enumerate_names(items: Iterable[str]) -> str:
    """Return one or several names as in a sentence: "a, b and c"."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
