"""Invented counts of the stages that score and measure, in the form that the stages record."""

from typing import Any

import numpy as np
from fabricated_texts import HOSTILE

from sbp_fast.evaluate.quality import unmeasured
from sbp_fast.evaluate.quality_rates import published_rates
from sbp_fast.evaluate.statistics import no_share


def interval(value: float, half: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, **more}


METRICS = {
    "heldout_bits_per_byte": {
        "label": "Held-out bits per byte",
        "better": "lower",
        "unit": "documents",
        "digits": 3,
        "percent": False,
        "chance": None,
    },
    **{
        f"{name}_accuracy": {
            "label": f"{name.capitalize()} accuracy",
            "better": "higher",
            "unit": "questions",
            "digits": 1,
            "percent": True,
            "chance": 0.25,
        }
        for name in ("continuation", "capital")
    },
}
RAW = "capital_accuracy_raw"
METRICS[RAW] = METRICS["capital_accuracy"] | {"label": "Capital accuracy, raw", "variant_of": "capital_accuracy"}


def score(value: float, half: float, runs: int, **more: Any) -> dict[str, Any]:
    """An arm's value in the form of `arm_interval`; the runs lie around the value."""
    run_values = [value + half * (run - (runs - 1) / 2) / 10 for run in range(runs)]
    return interval(
        value, half, over="documents" if runs == 1 else "runs and documents", runs=runs, run_values=run_values, **more
    )


def change(value: float, half: float, runs: int) -> dict[str, Any]:
    """A difference in the form of `difference_interval`."""
    ends = {} if runs > 1 else {"low": None, "high": None}
    return interval(value, half) | ends | {"runs": [runs, runs]}


def comparison(half: float = 0.012, runs: int = 3, **changes: float) -> dict[str, Any]:
    """Counts of a comparison in which arms, trained `runs` times each, differ from the baseline by so many bits per byte."""
    changes = {"sbp": -0.021, "oracle": -0.15} | changes
    arms = {
        arm: {
            "heldout_bits_per_byte": score(
                2.013 + change,
                0.031,
                runs,
                documents=471,
                by_source={
                    "even": score(1.9 + change, 0.04, runs, items=240),
                    "odd": score(2.1 + change, 0.05, runs, items=231),
                },
            ),
            "continuation_accuracy": score(0.33 - change, 0.05, runs, questions=313, chance=0.25, by_source={}),
            "capital_accuracy": score(0.27 - change / 2, 0.055, runs, questions=216, chance=0.25, by_source={}),
            RAW: score(0.4321 - change / 2, 0.055, runs, questions=216, chance=0.25, by_source={}),
        }
        for arm, change in {"baseline": 0.0, **changes}.items()
    }
    differences = {
        arm: {
            "heldout_bits_per_byte": change(value, half, runs),
            "continuation_accuracy": change(-value, 0.04, runs),
            "capital_accuracy": change(-value / 2, 0.05, runs),
            RAW: change(-value / 2, 0.05, runs),
        }
        for arm, value in changes.items()
    }
    pairwise = {
        arm: {
            other: {
                "heldout_bits_per_byte": change(value - changes[other], half, runs),
                "continuation_accuracy": change(changes[other] - value, 0.04, runs),
                "capital_accuracy": change((changes[other] - value) / 2, 0.05, runs),
            }
            for other in changes
            if other != arm
        }
        for arm, value in changes.items()
    }
    blind = no_share("the oracle's own gain is not distinguishable from zero")

    def shares(change: float) -> dict[str, Any]:
        share = interval(change / changes["oracle"], 0.08) if runs > 1 and abs(changes["oracle"]) > half else blind
        return {"heldout_bits_per_byte": share, "continuation_accuracy": blind, "capital_accuracy": blind, RAW: blind}

    return {
        "metrics": METRICS,
        "arms": arms,
        "differences": differences,
        "pairwise": pairwise,
        "recovered_share_of_oracle": {"oracle": {arm: shares(change) for arm, change in changes.items() if arm != "oracle"}},
        "confidence": 0.95,
    }


def rate(value: float | None, how: str, real: float | None = None, real_text: str = "", paper: bool = False) -> dict[str, Any]:
    if value is None:
        return unmeasured(how) | {"as_in_paper": paper}
    counts = {"documents": 900, "real_documents": 472 if real_text else 0}
    interval = {"low": value / 2, "high": value * 1.7}
    return {"rate": value, **interval, **counts, "real_rate": real, "real_text": real_text, "how": how, "as_in_paper": paper}


def relation(gain: float | None = 0.124, half: float = 0.021) -> dict[str, Any]:
    """Counts of the stage `relation`, without rates where there is no gain."""
    counts = {"pairs": 187, "partners": 61, "documents": 74, "tokens": 23_411, "minimum_pairs": 20}
    counts |= {"partners_too_long": 3, "without_other_seed": 1}
    settings = {"confidence": 0.95, "bootstrap_samples": 2000}
    if gain is None:
        return counts | settings | {"pairs": 7, "nats": None, "gain": None}
    nats = {"own": interval(3.217, 0.083), "other": interval(3.217 + gain, 0.085), "none": interval(3.603, 0.091)}
    return counts | settings | {"nats": nats, "gain": {"other": interval(gain, half), "none": interval(0.386, 0.033)}}


def judge_counts() -> dict[str, Any]:
    verdicts = {"asked": 200, "unparsable": 3, "faulty": 40, "rate": 40 / 197}
    return {
        "identity": {"kind": "endpoint", "model": HOSTILE, "url": "http://localhost:8000/v1", "temperature": 0},
        "prompts": {"non_factual": f"Is it wrong? {HOSTILE}"},
        "verdicts": {
            "non_factual": {"synthetic": verdicts, "real": {**verdicts, "faulty": 0, "rate": None}},
            "pair_irrelevance": dict.fromkeys(("synthetic", "random", "neighbors"), verdicts),
        },
    }


def quality(judge: dict[str, Any] | None) -> dict[str, Any]:
    """Counts of the stage `quality`, with those of a judge or without."""
    bins, fine = list(range(0, 520, 20)), np.linspace(-0.2, 1, 61)
    generator = np.random.default_rng(1)

    def similarities(mean: float) -> list[int]:
        return np.histogram(generator.normal(mean, 0.1, 200), fine)[0].tolist()

    return {
        "quality": {
            "repetition": {"label": "Repetition"}
            | rate(
                0.021,
                "documents in which a 13-token shingle occurs more than once, before rejection",
                0.012,
                "held-out documents",
            ),
            "duplicates": {"label": "Duplicates"} | rate(0.0, "documents that are near-duplicates of another filtered one"),
            "non_factual": {"label": "Non-factual"} | rate(None, "needs a judge"),
            "pair_irrelevance": {"label": "Pair-irrelevance"}
            | rate(0.32, "documents whose similarity to their seed lies below the band"),
            "pair_copying": {"label": "Pair-copying"}
            | rate(0.004, "documents that equal their seed but for punctuation", paper=True),
            "pair_containment": {"label": "Pair-containment"}
            | rate(0.0041, "documents that contain 30% of their seed's shingles"),
            "corpus_copying": {"label": "Corpus-copying"}
            | rate(0.017, "documents with 30% of their shingles in the corpus", 0.02, "held-out documents"),
        },
        "published": published_rates(),
        "similarity": {
            "low": 0.4821,
            "means": {"seed": 0.44, "random": 0.15, "neighbors": 0.63},
            "below": {"seed": 0.32, "random": 0.97, "neighbors": 0.0},
            "histogram": {
                "edges": fine.tolist(),
                "seed": similarities(0.44),
                "random": similarities(0.15),
                "neighbors": similarities(0.63),
            },
        },
        "novel": [
            {"tokens": 2, "synthetic": 0.131, "real_heldout": 0.117},
            {"tokens": 13, "synthetic": 0.981, "real_heldout": None},
        ],
        "sources": {source: of_source(index) for index, source in enumerate(("even", HOSTILE))},
        "stops": {"end": 0.94, "length": 0.05, "repetition": 0.01},
        "log_probability": {"mean": -2.4, "edges": [-4.0, -3.0, -2.0, -1.0], "generated": [3, 9, 4]},
        **({"judge": judge} if judge else {}),
        "measured": {"generated": 16, "passed": 12, "heldout": 12, "unique": 8},
        "lengths": {
            "edges": bins,
            "synthetic": np.histogram(generator.gamma(4, 55, 900), bins)[0].tolist(),
            "real": np.histogram(generator.gamma(9, 34, 2443), bins)[0].tolist(),
        },
    }


def of_source(index: int) -> dict[str, Any]:
    return {
        "documents": 8 + index,
        "mean_tokens": 118.75,
        "judged": 4,
        "rates": {
            "repetition": 0.125 * index,
            "pair_irrelevance": None if index else 0.375,
            "pair_containment": 0.0625,
            "corpus_copying": 0.03125,
        },
    }
