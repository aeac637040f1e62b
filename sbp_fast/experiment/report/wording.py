"""The report's sentences about the outcome; a claim needs an interval over training runs that excludes zero."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from sbp_fast.config.sources import SCRATCH
from sbp_fast.pipeline.progress import short

MINUS = "\N{MINUS SIGN}"
PAPER_RATIO = 19.5  # 20, less rounding
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
        labels = _enumerate(results["arms"][arm]["label"] for arm in arms)
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
        sentences.append(f"{_sentence_start(kind, reason)} in {_in_a_sentence(metric['label'])}: {_enumerate(listed)}.")
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
        clauses = [CONTROL_CLAUSES[kind].format(_enumerate(shown)) for kind, shown in groups.items()]
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
            sentences.append(f"As a share of the {_in_a_sentence(arms[oracle]['label'])}'s gain: {_enumerate(given)}.")
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
    return f"Brackets are intervals over training runs ({_run_counts(results)}) and held-out text together."


def _run_counts(results: Results) -> str:
    arms = results["arms"].values()
    counts = {arm["training_runs"] for arm in arms}
    if len(counts) == 1:
        return f"{counts.pop()} an arm"
    return ", ".join(f"{_in_a_sentence(arm['label'])} {arm['training_runs']}" for arm in arms)


def budget(results: Results) -> str:
    """Return how the arms' training tokens compare."""
    arms = results["arms"]
    tokens = [arm["tokens"] for arm in arms.values()]
    if max(tokens) - min(tokens) <= MATCHED * max(tokens):
        return f"at the same {short(tokens[0])} training tokens"
    each = ", ".join(f"{_in_a_sentence(arm['label'])} {short(arm['tokens'])}" for arm in arms.values())
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
            f"{_sentence_start(*key).lower()}: {_enumerate(_figure(results, arm, name) + unit for arm in members)}"
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


def start_of(results: Results, name: str) -> str:
    """Return what the synthesizer of a source starts from."""
    start = results["sources"][name]["start"]
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
        f"The {_in_a_sentence(arm['label'])} may read {ratio:.3g} times the unique text of the other arms"
        + (f", not 20 times as in the paper{reason}." if ratio < PAPER_RATIO else ".")
        + f" At this budget it reads {short(arm['unique_tokens_read'])} of its {short(arm['unique_tokens'])} tokens."
        for arm in arms.values()
        if arm["data"] == "all"
    ]
    sentences += [
        _repetition_limit(baseline["real_epochs"]),
        *_interval_limits(results),
        *_unequal_arms(results),
        "Arms are matched in the tokens of their final training. What the other stages cost is in the ledger; no baseline was "
        "trained on the total compute of an arm with synthetic documents.",
    ]
    name = shown_source(results)
    rates = {} if name is None else results["sources"][name]["synthetic_quality"]["quality"]
    unmeasured = [rate["label"].lower() for rate in rates.values() if rate["rate"] is None]
    if unmeasured:
        sentences.append(
            f"Not measured: {', '.join(unmeasured)}. No judge or reference for it is at hand, and no stand-in is reported."
        )
    return sentences


def _unequal_arms(results: Results) -> list[str]:
    """Return what the arms of a comparison do not have in common and the training runs of an arm do."""
    arms, sentences = results["arms"].values(), []
    if any(arm["synthetic"] and arm["training_runs"] > 1 for arm in arms):
        sentences.append(
            "The training runs of an arm share one synthesizer and its documents: the intervals do not cover what another "
            "synthesizer would have written."
        )
    if len({arm["recipes_tried"] for arm in arms}) > 1:
        tried = ", ".join(f"{arm['label']} {arm['recipes_tried']}" for arm in arms)
        sentences.append(f"Recipes tried: {tried}. An arm that could choose among more has an advantage.")
    shares = {arm["label"]: arm["synthetic_tokens"] / arm["tokens"] for arm in arms if arm["synthetic"]}
    if shares and max(shares.values()) - min(shares.values()) > MATCHED:
        shown = ", ".join(f"{label} {share:.1%}" for label, share in shares.items())
        sentences.append(f"The synthetic share of the tokens differs: {shown}.")
    return sentences


def _repetition_limit(epochs: float) -> str:
    if epochs <= 1:
        return (
            f"The baseline reads {100 * epochs:.3g}% of its corpus and nothing twice: this run does not show what repetition "
            "costs, nor what synthetic text could replace of it."
        )
    return (
        f"The baseline reads its corpus {epochs:.3g} times. Text may be repeated about four times at nearly the worth of fresh "
        "text (arXiv 2305.16264)" + (": at this budget there is little for SBP to win back." if epochs < 4 else ".")
    )


def _shown_differences(results: Results) -> list[Mapping[str, Any]]:
    """Return the differences that the page shows: to the baseline by every metric, and of each two other arms by the first."""
    arms, others, first = results["arms"], other_arms(results), primary_metric(results)
    to_baseline = [difference for arm in others for difference in arms[arm]["difference_to_baseline"].values()]
    return to_baseline + [arms[arm]["difference_to"][other][first] for arm, other in itertools.combinations(others, 2)]


def _interval_limits(results: Results) -> list[str]:
    """Return what the intervals cover and what they do not."""
    confidence = f"{100 * results['confidence']:.3g}%"
    differences = sum(map(has_interval, _shown_differences(results)))
    if not differences:
        return [
            f"Training runs: {_run_counts(results)}. A difference of two arms has an interval, and with it a conclusion, only "
            f"with two runs of each. The brackets on arms that were trained once are {confidence} intervals over documents and "
            "questions, not over trainings."
        ]
    sentences = [
        f"Training runs: {_run_counts(results)}. Brackets on differences are {confidence} intervals over training runs and "
        "documents (or questions) together, paired by document. Each is at that level by itself: of the "
        f"{differences} differences with an interval on this page, some may exclude zero by luck."
    ]
    if synthetic_arms(results):
        sentences.append(
            "All runs of an arm read the same corpus and the same synthetic documents: the intervals do not cover what another "
            "sample of documents, or another synthesizer, would have changed."
        )
    return sentences


def _in_a_sentence(label: str) -> str:
    return label if label.isupper() else f"{label[0].lower()}{label[1:]}"


def _enumerate(items: Iterable[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
