"""`report.html`: one self-contained page about a finished run, made from `results.json`, loss curves and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sbp_fast.config import RunConfig
from sbp_fast.config.files import dump_config
from sbp_fast.experiment.arms import arms_of
from sbp_fast.experiment.graph import model_stage, stages_of
from sbp_fast.experiment.report import plots, wording
from sbp_fast.experiment.report.contents import SECTIONS, sections_of
from sbp_fast.experiment.report.examples import collect_triples
from sbp_fast.experiment.report.limits import limits
from sbp_fast.experiment.report.relation import NATS, relation_sentences
from sbp_fast.experiment.report.templates import page_environment
from sbp_fast.experiment.results import write_results
from sbp_fast.experiment.sources import sources_of
from sbp_fast.pairs.examples import EXAMPLES
from sbp_fast.pipeline.files import atomic_open, read_json
from sbp_fast.pipeline.progress import duration, short
from sbp_fast.train.log import METRICS, read_curve

REPORT = "report.html"
LOSS, HELDOUT_LOSS = "train/loss", "validation/loss"
JUDGED_GROUPS = {
    "synthetic": "synthetic documents",
    "real": "their seeds",
    "random": "random pairs",
    "neighbors": "true pairs",
}

ARM_PALETTE = (("#5b6b82", "#9db0cb"), ("#c8480b", "#ff9154"), ("#0d7a6b", "#3fcdb6"))
"""Colors of the first arms on a light and on a dark page; `arm_palette` computes those of the others."""


def arm_palette(count: int) -> list[tuple[str, str]]:
    """Return the CSS colors of each arm on a light and on a dark page; computed hues advance by the golden angle.

    Colors of equal lightness in Oklch have about equal contrast to the page, whatever their hue.
    """
    hues = [(300 + 137.5 * index) % 360 for index in range(count)]
    computed = [(f"oklch(50% 0.12 {hue:.0f})", f"oklch(78% 0.12 {hue:.0f})") for hue in hues]
    return [*ARM_PALETTE, *computed][:count]


def write_report(run_directory: Path) -> Path:
    """Write `results.json` and `report.html` of a finished run; returns the path of the page.

    Raises:
        UserError: a stage is not finished, or the directory is no run.
    """
    run_directory = Path(run_directory)
    results = write_results(run_directory)
    config = RunConfig.model_validate(results["run"]["config"])
    curves = {
        name: {figure: read_curve(run_directory / name / METRICS, figure) for figure in (LOSS, HELDOUT_LOSS)}
        for name in stages_of(config)
        if name.startswith(("train/", "tune/", "choose/"))
    }
    triples, examples = [], []
    if (name := wording.shown_source(results)) is not None:
        source = sources_of(config)[name]
        triples, examples = collect_triples(run_directory, source), read_json(run_directory / source.related / EXAMPLES)
    page = render(results, curves, triples, examples)
    with atomic_open(run_directory / REPORT) as file:
        file.write(page.encode())
    return run_directory / REPORT


def render(
    results: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    triples: Sequence[Mapping[str, Any]],
    pair_examples: Sequence[Mapping[str, Any]],
) -> str:
    """Return the page as HTML that needs no other file and no network."""
    environment = page_environment("sbp_fast.experiment.report")
    environment.filters |= {
        "count": count,
        "flops": flops,
        "duration": seconds,
        "percent": percent,
        "decimal": decimal,
        "plain": plain,
        "number_word": number_word,
    }
    environment.globals |= {
        "measure": measure,
        "change": change,
        "difference": difference,
        "missing_shares": wording.missing_shares,
        "nats": NATS,
        "judged_groups": JUDGED_GROUPS,
    }
    name = wording.shown_source(results)
    shown = None if name is None else results["sources"][name]
    return environment.get_template("report.html.jinja").render(
        results=results,
        sections=sections_of(results),
        titles={section.anchor: section.title for section in SECTIONS},
        shown=shown,
        shown_name=name,
        shown_start=wording.start_of(results, name) if name else "",
        shown_elsewhere=name is not None and wording.starts_elsewhere(results, name),
        source_descriptions=wording.source_descriptions(results),
        main_metrics=wording.main_metrics(results["metrics"]),
        metric_variants=wording.metric_variants(results["metrics"]),
        verdict=wording.verdict(results),
        headline=wording.headline(results),
        secondary=wording.secondary_sentences(results),
        descriptions=wording.arm_descriptions(results),
        budget=wording.budget(results),
        limits=limits(results),
        paper_elsewhere=_other_measures(shown["synthetic_quality"]) if shown else [],
        relation_sentences=relation_sentences(shown["relation"]) if shown else [],
        palette=arm_palette(len(results["arms"])),
        plots=_plots(results, curves),
        triples=triples,
        pair_examples=pair_examples,
        real_texts=_real_texts(shown["synthetic_quality"]["quality"]) if shown else [],
        reasons=sorted({triple["reason"] for triple in triples if triple["reason"]}),
        config=dump_config(RunConfig.model_validate(results["run"]["config"])),
    )


def _real_texts(quality: Mapping[str, Any]) -> list[str]:
    """Return, for each rate with a comparison, its label and the real documents that it is compared with."""
    return [f"{rate['label'].lower()}, {rate['real_text']}" for rate in quality.values() if rate["real_text"]]


def _other_measures(quality: Mapping[str, Any]) -> list[str]:
    """Return the paper's figures of the rates that are measured otherwise here, a text for each rate."""
    published, texts = quality["published"], []
    for name, by_column in published["rates"].items():
        if not quality["quality"][name]["as_in_paper"]:
            figures = [f"{100 * rate:.1f}% ({column})" for column, rate in by_column.items() if rate is not None]
            texts.append(f"{quality['quality'][name]['label'].lower()} {', '.join(figures)}")
    return texts


def _plots(results: Mapping[str, Any], curves: Mapping[str, Any]) -> dict[str, Any]:
    metrics = wording.main_metrics(results["metrics"])
    arms, config = results["arms"], RunConfig.model_validate(results["run"]["config"])
    pretraining = [
        plots.LossCurve(arm.label, plots.arm_color(index), curves[model_stage(arm, arm.name)][LOSS], ())
        for index, arm in enumerate(arms_of(config).values())
    ]
    svgs: dict[str, Any] = {
        "tokens": _tokens_plot(arms),
        "arms": {name: plots.arms_plot(arms, name, metric) for name, metric in metrics.items()},
        "differences": {
            name: plots.difference_plot(arms, results["baseline"], name, metric)
            for name, metric in metrics.items()
            if len(arms) > 1
        },
        "losses": plots.loss_plot("pretraining", "Pretraining", pretraining),
    }
    if (name := wording.shown_source(results)) is not None:
        quality, pairs = results["sources"][name]["synthetic_quality"], results["sources"][name]["pairs"]
        tuned = curves[sources_of(config)[name].synthesizer]
        tuning = [plots.LossCurve("Synthesizer", plots.COLORS["synthesizer"], tuned[LOSS], tuned[HELDOUT_LOSS])]
        svgs |= {
            "synthesizer": plots.loss_plot("synthesizer", "Tuning the synthesizer", tuning),
            "similarity": plots.similarity_plot(pairs["histogram"], pairs["band"]),
            "lengths": plots.lengths_plot(quality["lengths"]),
            "seed_similarity": plots.seed_similarity_plot(quality["similarity"]) if quality["similarity"] else "",
            "log_probability": plots.log_probability_plot(quality["log_probability"]),
        }
    return {
        name: {metric: Markup(each) for metric, each in svg.items()} if isinstance(svg, dict) else Markup(svg)
        for name, svg in svgs.items()
    }


def _tokens_plot(arms: Mapping[str, Any]) -> str:
    """Return the plot of bits per byte against training tokens; "" where no arm has a finite value of validation documents."""
    curves = [
        plots.ArmCurves(arm["label"], plots.arm_color(index), list(arm["validation"]["curves"].values()))
        for index, arm in enumerate(arms.values())
        if any(arm["validation"].get("curves", {}).values())
    ]
    return plots.tokens_plot(curves) if curves else ""


def _data(value: float, text: str | Markup) -> Markup:
    """Return a shown number as an element that carries the exact value."""
    return Markup('<data value="{}">{}</data>').format(value, text)


def difference(interval: Mapping[str, Any], metric: Mapping[str, Any]) -> Markup:
    """Return a difference with its interval, without an outcome."""
    return _with_interval(interval, metric, signed=True)


def count(value: float) -> Markup:
    """Return a count: whole if it is a small integer, else abbreviated."""
    return _data(value, f"{value:,}" if isinstance(value, int) and value < 100_000 else short(value))


def number_word(value: int) -> str:
    """Return a small number as a word that begins a sentence."""
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")
    return words[value] if value < len(words) else str(value)


def plain(value: float) -> Markup:
    """Return a number as it is written in the configuration."""
    return _data(value, f"{value:g}")


def decimal(value: float, digits: int = 2) -> Markup:
    """Return a number with a fixed number of decimals."""
    return _data(value, f"{value:.{digits}f}".replace("-", wording.MINUS))


def percent(value: float, digits: int = 1) -> Markup:
    """Return a share in percent."""
    return _data(value, f"{100 * value:.{digits}f}%".replace("-", wording.MINUS))


def seconds(value: float) -> Markup:
    """Return a duration given in seconds."""
    return _data(value, duration(value))


def flops(value: float) -> Markup:
    """Return a number of operations in scientific notation."""
    if value == 0:
        return _data(value, "0")
    mantissa, exponent = f"{value:.2e}".split("e")
    return _data(value, Markup("{}&thinsp;&times;&thinsp;10<sup>{}</sup>").format(mantissa, int(exponent)))


def measure(interval: Mapping[str, Any], metric: Mapping[str, Any]) -> Markup:
    """Return a value with its interval, and the remark that it is at chance."""
    remark = Markup(' <span class="note">at chance</span>') if wording.at_chance(interval, metric) else ""
    return _with_interval(interval, metric, signed=False) + remark


def change(difference: Mapping[str, Any], metric: Mapping[str, Any]) -> Markup:
    """Return a difference with its interval, or with the reason why it has none, in an element whose class is the outcome."""
    kind, reason = wording.outcome(difference, metric), wording.missing_replication(difference)
    remark = Markup(' <span class="note">{}: no conclusion</span>').format(reason) if reason else ""
    return Markup('<span class="change {}">{}{}</span>').format(kind, _with_interval(difference, metric, signed=True), remark)


def _with_interval(interval: Mapping[str, Any], metric: Mapping[str, Any], signed: bool) -> Markup:
    keys = ("value", "low", "high") if wording.has_interval(interval) else ("value",)
    value, *ends = (_data(interval[key], wording.number(interval[key], metric, signed)) for key in keys)
    return Markup('{} <span class="interval">[{}, {}]</span>').format(value, *ends) if ends else value
