"""`report.html`: one self-contained page that shows a finished run, drawn from `results.json` and the curves beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sbp_fast.config import RunConfig
from sbp_fast.config.files import dump_config
from sbp_fast.experiment.report import plots, wording
from sbp_fast.experiment.report.examples import collect_triples
from sbp_fast.experiment.results import STAGES, write_results
from sbp_fast.pairs.examples import EXAMPLES
from sbp_fast.pipeline.files import atomic_open, read_json
from sbp_fast.pipeline.progress import duration, short

REPORT = "report.html"
PRETRAININGS = {"baseline": "base", "sbp": "joint", "oracle": "oracle"}
QUALITIES = {
    "repetition": "Repetition",
    "duplicates": "Duplicates",
    "non_factual": "Non-factual",
    "pair_irrelevance": "Pair-irrelevance",
    "pair_copying": "Pair-copying",
    "pair_containment": "Pair-containment",
    "corpus_copying": "Corpus-copying",
}


JUDGED_GROUPS = {
    "synthetic": "synthetic documents",
    "real": "their seeds",
    "random": "random pairs",
    "neighbours": "true pairs",
}
SOURCE_RATES = ("repetition", "pair_irrelevance", "pair_containment", "corpus_copying")
"""Of those, what is known by the source of the seed."""


def write_report(run_directory: Path) -> Path:
    """Write `results.json` and `report.html` of a finished run; returns the path of the page.

    Raises:
        UserError: a stage that is not finished, a directory that is no run.
    """
    run_directory = Path(run_directory)
    results = write_results(run_directory)
    curves = {
        stage: read_curve(run_directory / STAGES[stage] / "metrics.jsonl")
        for stage in ("base", "joint", "oracle", "synthesizer")
    }
    examples = read_json(run_directory / STAGES["pair"] / EXAMPLES)
    page = render(results, curves, collect_triples(run_directory), examples)
    with atomic_open(run_directory / REPORT) as file:
        file.write(page.encode())
    return run_directory / REPORT


def read_curve(path: Path) -> list[tuple[float, float]]:
    """(training tokens, loss) of each step that has one."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(line["train/tokens"], line["train/loss"]) for line in lines if line["train/loss"] is not None]


def render(
    results: Mapping[str, Any],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    triples: Sequence[Mapping[str, Any]],
    pair_examples: Sequence[Mapping[str, Any]],
) -> str:
    """The page as text; needs no file and no network to show."""
    environment = Environment(
        loader=PackageLoader("sbp_fast.experiment.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count,
        "flops": flops,
        "duration": seconds,
        "percent": percent,
        "decimal": decimal,
        "plain": plain,
    }
    environment.globals |= {
        "measure": measure,
        "change": change,
        "label": wording.metric_label,
        "qualities": QUALITIES,
        "source_rates": SOURCE_RATES,
        "judged_groups": JUDGED_GROUPS,
    }
    metrics = wording.metric_names(results)
    return environment.get_template("report.html.jinja").render(
        results=results,
        metrics=metrics,
        verdict=wording.verdict(results),
        headline=wording.headline(results),
        accuracies=[wording.accuracy_sentence(results, metric) for metric in metrics[1:]],
        budget=wording.budget(results),
        limits=wording.limits(results),
        arm_names=plots.LABELS,
        plots=_plots(results, metrics, curves),
        triples=triples,
        pair_examples=pair_examples,
        real_texts=_real_texts(results["synthetic_quality"]["quality"]),
        reasons=sorted({triple["reason"] for triple in triples if triple["reason"]}),
        config=dump_config(RunConfig.model_validate(results["run"]["config"])),
    )


def _real_texts(quality: Mapping[str, Any]) -> list[str]:
    """Which real documents stand beside each rate."""
    return [f"{QUALITIES[key].lower()}, {found['real_text']}" for key, found in quality.items() if found["real_text"]]


def _plots(results: Mapping[str, Any], metrics: Sequence[str], curves: Mapping[str, Any]) -> dict[str, Any]:
    quality = results["synthetic_quality"]
    drawn = {
        "arms": [plots.arms_plot(results["arms"], metric, wording.metric_label(metric)) for metric in metrics],
        "losses": plots.loss_plot("pretraining", "Pretraining", {arm: curves[run] for arm, run in PRETRAININGS.items()}),
        "synthesizer": plots.loss_plot("synthesizer", "Tuning the synthesizer", {"synthesizer": curves["synthesizer"]}),
        "similarity": plots.similarity_plot(results["pairs"]["histogram"], results["pairs"]["band"]),
        "lengths": plots.lengths_plot(quality["lengths"]),
        "drawn_similarity": plots.drawn_similarity_plot(quality["similarity"]),
        "log_probability": plots.log_probability_plot(quality["log_probability"]),
    }
    return {name: [Markup(one) for one in svg] if isinstance(svg, list) else Markup(svg) for name, svg in drawn.items()}


def _data(value: float, text: str | Markup) -> Markup:
    """A shown number with the exact one that it stands for."""
    return Markup('<data value="{}">{}</data>').format(value, text)


def count(value: float) -> Markup:
    return _data(value, f"{value:,}" if isinstance(value, int) and value < 100_000 else short(value))


def plain(value: float) -> Markup:
    """A setting as it was written."""
    return _data(value, f"{value:g}")


def decimal(value: float, digits: int = 2) -> Markup:
    return _data(value, f"{value:.{digits}f}".replace("-", wording.MINUS))


def percent(value: float, digits: int = 1) -> Markup:
    return _data(value, f"{100 * value:.{digits}f}%".replace("-", wording.MINUS))


def seconds(value: float) -> Markup:
    return _data(value, duration(value))


def flops(value: float) -> Markup:
    if value == 0:
        return _data(value, "0")
    mantissa, exponent = f"{value:.2e}".split("e")
    return _data(value, Markup("{}&thinsp;&times;&thinsp;10<sup>{}</sup>").format(mantissa, int(exponent)))


def measure(found: Mapping[str, Any], metric: str) -> Markup:
    """A value with its interval."""
    return _with_interval(found, metric, signed=False)


def change(found: Mapping[str, Any], metric: str) -> Markup:
    """A difference with its interval, marked by what it means."""
    kind = "unclear" if not wording.excludes_zero(found) else "better" if wording.is_better(found, metric) else "worse"
    return Markup('<span class="change {}">{}</span>').format(kind, _with_interval(found, metric, signed=True))


def _with_interval(found: Mapping[str, Any], metric: str, signed: bool) -> Markup:
    value, low, high = (_data(found[key], wording.number(found[key], metric, signed)) for key in ("value", "low", "high"))
    return Markup('{} <span class="interval">[{}, {}]</span>').format(value, low, high)
