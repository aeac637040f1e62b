"""The report's caveats: what the results do not show."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from sbp_fast.experiment.report.wording import (
    MATCHED,
    Results,
    has_interval,
    in_a_sentence,
    other_arms,
    primary_metric,
    run_counts,
    shown_source,
    start_of,
    starts_elsewhere,
    synthetic_arms,
)
from sbp_fast.pipeline.progress import short

PAPER_RATIO = 19.5  # 20, less rounding


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
        f"The {in_a_sentence(arm['label'])} may read {ratio:.3g} times the unique text of the other arms"
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
    sentences += _foreign_models(results)
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


def _foreign_models(results: Results) -> list[str]:
    """Return what a model pretrained elsewhere brings into the comparison."""
    return [
        f"The synthesizer of {name} starts from {start_of(results, name)}: what arms gain by its documents may come from the "
        "text that this model has read, and what its pretraining cost is not in the ledger."
        for name in results["sources"]
        if starts_elsewhere(results, name)
    ]


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
            f"Training runs: {run_counts(results)}. A difference of two arms has an interval, and with it a conclusion, only "
            f"with two runs of each. The brackets on arms that were trained once are {confidence} intervals over documents and "
            "questions, not over trainings."
        ]
    sentences = [
        f"Training runs: {run_counts(results)}. Brackets on differences are {confidence} intervals over training runs and "
        "documents (or questions) together, paired by document. Each is at that level by itself: of the "
        f"{differences} differences with an interval on this page, some may exclude zero by luck."
    ]
    if synthetic_arms(results):
        sentences.append(
            "All runs of an arm read the same corpus and the same synthetic documents: the intervals do not cover what another "
            "sample of documents, or another synthesizer, would have changed."
        )
    return sentences
