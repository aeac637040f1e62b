"""The report's plots: matplotlib drawings as inline SVG that takes its colors from the page's style sheet.

Each color is drawn as a placeholder and then replaced by a CSS variable, so that one plot serves light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sbp_fast.experiment.report.wording import has_interval, number, outcome

COLORS = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "accent": "#040404",
    "good": "#050505",
    "synthesizer": "#060606",
    "band": "#070707",
    "card": "#090909",
}
"""CSS variable -> its placeholder in the drawing; `arm_color` has the placeholders of arms."""


def arm_color(index: int) -> str:
    """Return the placeholder of the color of arm `index`, which becomes the CSS variable `--arm-INDEX`."""
    return f"#08{index // 256:02x}{index % 256:02x}"


CURVE_POINTS = 60
MARKERS = "os^Dv<>P*"  # of arms in turn, so that color alone does not tell them apart
LEGEND_INSIDE = 4  # curves whose legend has space inside the plot
LEGEND_COLUMNS, LEGEND_CHARACTERS = 3, 48  # of a legend below the plot: most columns; characters that a row has space for
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLORS["grid"],
    "axes.labelcolor": COLORS["muted"],
    "axes.titlecolor": COLORS["ink"],
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": COLORS["grid"],
    "ytick.color": COLORS["grid"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "text.color": COLORS["ink"],
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def arms_plot(arms: Mapping[str, Any], name: str, metric: Mapping[str, Any]) -> str:
    """Draw one dot with its interval for each arm, small dots for its runs, and a line at chance where there is such a value.

    Args:
        arms: arm -> its entry in `results.json`.
        name: name of the metric.
        metric: description of the metric (see `Metric.describe`).
    """
    scale = 100.0 if metric["percent"] else 1.0

    def draw(axes: Axes) -> None:
        for row, arm in enumerate(arms.values()):
            _interval_row(axes, row, arm[name], metric, arm_color(row), signed=False)
            runs = arm[name]["run_values"]
            if len(runs) > 1:
                dots = [value * scale for value in runs]
                axes.plot(dots, [row + 0.22] * len(runs), "o", color=arm_color(row), markersize=3, alpha=0.6)
        if metric["chance"] is not None:
            _reference_line(axes, metric["chance"] * scale, "chance", len(arms))
        _label_rows(axes, [arm["label"] for arm in arms.values()], metric["label"], "percent" if metric["percent"] else "")

    return _svg(f"arms-{name}", f"{metric['label']} of the arms", draw, _rows_size(arms))


def difference_plot(arms: Mapping[str, Any], baseline: str, name: str, metric: Mapping[str, Any]) -> str:
    """Draw the difference of each other arm to the baseline with its interval (a forest plot).

    A color is used only where the interval excludes zero; a difference without an interval is an empty circle.

    Args:
        arms: arm -> its entry in `results.json`.
        baseline: the arm that the others are compared with.
        name: name of the metric.
        metric: description of the metric (see `Metric.describe`).
    """
    colors = {"better": COLORS["good"], "worse": COLORS["accent"], "unclear": COLORS["muted"], "unreplicated": COLORS["muted"]}

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=COLORS["muted"], linewidth=1, linestyle=(0, (3, 3)))
        for row, arm in enumerate(arms.values()):
            if difference := arm["difference_to_baseline"].get(name):
                _interval_row(axes, row, difference, metric, colors[outcome(difference, metric)], signed=True)
        reference = list(arms).index(baseline)
        axes.plot([0], [reference], "|", color=COLORS["ink"], markersize=9, markeredgewidth=1.8)
        unit = "percentage points" if metric["percent"] else ""
        _label_rows(axes, [arm["label"] for arm in arms.values()], f"Change in {_lower(metric['label'])}", unit)

    return _svg(f"differences-{name}", f"{metric['label']}: differences to the baseline", draw, _rows_size(arms))


def _lower(label: str) -> str:
    return f"{label[0].lower()}{label[1:]}"


def _rows_size(rows: Mapping[str, Any]) -> tuple[float, float]:
    """Return the inches of a plot with a row for each arm."""
    return 4.9, 0.8 + 0.42 * len(rows)


def _interval_row(
    axes: Axes, row: int, interval: Mapping[str, Any], metric: Mapping[str, Any], color: str, signed: bool
) -> None:
    """Draw a value with its interval and its number; an empty circle if it has no interval."""
    scale = 100.0 if metric["percent"] else 1.0
    value, known = interval["value"] * scale, has_interval(interval)
    if known:
        axes.plot([interval["low"] * scale, interval["high"] * scale], [row, row], color=color, linewidth=2.2)
    axes.plot([value], [row], "o", color=color, markersize=7, fillstyle="full" if known else "none")
    behind = {"facecolor": COLORS["card"], "edgecolor": "none", "pad": 0.6}  # the number stays readable on a line
    text = number(interval["value"], metric, signed)
    axes.annotate(text, (value, row), (0, 8), textcoords="offset points", ha="center", bbox=behind)


def _reference_line(axes: Axes, value: float, label: str, rows: int) -> None:
    axes.axvline(value, color=COLORS["muted"], linewidth=1, linestyle=(0, (3, 3)))
    axes.annotate(label, (value, rows - 0.45), (4, 0), textcoords="offset points", color=COLORS["muted"])


def _label_rows(axes: Axes, labels: Sequence[str], title: str, unit: str) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=COLORS["ink"])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
    axes.locator_params(axis="x", nbins=6)
    axes.set_title(title)
    axes.set_xlabel(unit)


@dataclass(frozen=True)
class LossCurve:
    """The losses of one training run; a point is (training tokens, loss in nats a token).

    Attributes:
        label: name of the model.
        color: placeholder of its color.
        training: points of the steps.
        heldout: points at which the loss on validation documents was measured; none where it was not.
    """

    label: str
    color: str
    training: Sequence[tuple[float, float]]
    heldout: Sequence[tuple[float, float]]


def loss_plot(name: str, title: str, curves: Sequence[LossCurve]) -> str:
    """Draw losses over training tokens: of training, averaged over stretches of steps, and held-out ones as dots on dashes.

    Args:
        name: prefix of the ids in the SVG.
        title: title of the plot.
        curves: losses of each training run.
    """

    def draw(axes: Axes) -> None:
        unit, divisor = _token_unit(max(curve.training[-1][0] for curve in curves))
        for curve in curves:
            tokens, losses = _thinned(np.array(curve.training, np.float64))
            axes.plot(tokens / divisor, losses, color=curve.color, label=curve.label)
            if curve.heldout:
                tokens, losses = np.array(curve.heldout, np.float64).T
                axes.plot(tokens / divisor, losses, "o--", color=curve.color, linewidth=1.2, markersize=3.2)
        if any(curve.heldout for curve in curves):
            axes.plot([], [], "o--", color=COLORS["muted"], linewidth=1.2, markersize=3.2, label="held-out")
        axes.set_xlabel(f"training tokens, {unit}")
        axes.set_ylabel("loss, nats a token")
        axes.set_title(title)
        if len(axes.get_legend_handles_labels()[0]) > 1 and len(curves) <= LEGEND_INSIDE:
            axes.legend(loc="best", labelcolor=COLORS["ink"])
        elif len(curves) > LEGEND_INSIDE:
            _legend_below(axes)

    columns = _legend_columns([curve.label for curve in curves])
    below = 0.2 * -(-len(curves) // columns) if len(curves) > LEGEND_INSIDE else 0.0
    return _svg(name, title, draw, (4.9, 3.0 + below))


@dataclass(frozen=True)
class ArmCurves:
    """Bits per byte of validation documents while the runs of an arm were trained.

    Attributes:
        label: of the arm.
        color: placeholder of its color.
        runs: points of each training run, with "step", "tokens" and "bits_per_byte", steps rising.
    """

    label: str
    color: str
    runs: Sequence[Sequence[Mapping[str, Any]]]

    def mean(self) -> np.ndarray:
        """Return (training tokens, bits per byte), means over the runs at each step that all have; float64 [points, 2]."""
        by_step = [{point["step"]: (point["tokens"], point["bits_per_byte"]) for point in run} for run in self.runs]
        common = sorted(set.intersection(*map(set, by_step)))
        points = [[run[step] for run in by_step] for step in common]
        return np.array(points, np.float64).reshape(len(common), len(self.runs), 2).mean(1)


def tokens_plot(arms: Sequence[ArmCurves]) -> str:
    """Draw bits per byte of validation documents over training tokens: the mean of each arm's runs thick, each run thin."""

    def draw(axes: Axes) -> None:
        unit, divisor = _token_unit(max(point["tokens"] for arm in arms for run in arm.runs for point in run))
        for index, arm in enumerate(arms):
            for run in arm.runs if len(arm.runs) > 1 else ():
                tokens, bits = [point["tokens"] / divisor for point in run], [point["bits_per_byte"] for point in run]
                axes.plot(tokens, bits, color=arm.color, linewidth=0.7, alpha=0.5)
            tokens, bits = arm.mean().T
            marker = MARKERS[index % len(MARKERS)]
            axes.plot(tokens / divisor, bits, color=arm.color, marker=marker, markersize=3.6, label=arm.label)
        axes.set_xlabel(f"training tokens, {unit}")
        axes.set_ylabel("bits per byte")
        axes.set_title("Held-out bits per byte while training")
        _legend_below(axes)

    return _svg(
        "tokens", "Held-out bits per byte of each arm against training tokens", draw, (4.9, 3.2 + 0.2 * -(-len(arms) // 3))
    )


def _legend_below(axes: Axes) -> None:
    columns = _legend_columns(axes.get_legend_handles_labels()[1])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, labelcolor=COLORS["ink"])


def _legend_columns(labels: Sequence[str]) -> int:
    """Return the number of columns in which labels, all as wide as the longest, are no wider than the plot."""
    return max(1, min(LEGEND_COLUMNS, LEGEND_CHARACTERS // max(map(len, labels))))


def _token_unit(largest: float) -> tuple[str, float]:
    """Return the name of the unit in which tokens are shown, and the tokens in it."""
    return ("millions", 1e6) if largest >= 1e6 else ("thousands", 1e3)


def _thinned(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = np.array_split(points, min(len(points), CURVE_POINTS))
    return np.array([part[:, 0].mean() for part in parts]), np.array([part[:, 1].mean() for part in parts])


def similarity_plot(histogram: Mapping[str, Any], band: Mapping[str, Any]) -> str:
    """Draw similarities to the nearest neighbor, of random pairs and of the pairs, as percent in bins, with the band shaded."""

    def draw(axes: Axes) -> None:
        axes.axvspan(band["low"], min(band["high"], histogram["edges"][-1]), color=COLORS["band"], alpha=0.16, linewidth=0)
        series = (("random", "muted", "Random pairs"), ("nearest", "accent", "Nearest neighbors"), ("pairs", "good", "Pairs"))
        _histograms(axes, histogram, series)
        _label_similarities(axes, "How similar related documents are", band["low"])

    return _svg("similarity", "Histogram of similarities with the band of accepted pairs", draw, (4.9, 3.0))


def seed_similarity_plot(similarity: Mapping[str, Any]) -> str:
    """Draw similarities of synthetic documents to their seeds, beside random and true pairs, and the low end of the band."""
    series = (
        ("random", "muted", "To another's seed"),
        ("neighbors", "good", "True partner to seed"),
        ("seed", "accent", "To its seed"),
    )

    def draw(axes: Axes) -> None:
        _histograms(axes, similarity["histogram"], series)
        axes.axvline(similarity["low"], color=COLORS["muted"], linewidth=1, linestyle=(0, (3, 3)))
        _label_similarities(axes, "How near a document stays to its seed", similarity["low"])

    return _svg("seed-similarity", "Histogram of similarities of synthetic documents to seeds", draw, (4.9, 3.0))


def _label_similarities(axes: Axes, title: str, low: float) -> None:
    axes.annotate("band", (low, 0.94), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points")
    axes.set_xlabel("cosine similarity")
    axes.set_title(title)
    _legend_below(axes)


def log_probability_plot(histogram: Mapping[str, Any]) -> str:
    """Draw the mean log-probability of each synthetic document's tokens under the synthesizer."""

    def draw(axes: Axes) -> None:
        _histograms(axes, histogram, (("generated", "accent", "Synthetic, all"),))
        axes.set_xlabel("mean log-probability, nats a token")
        axes.set_title("How sure the synthesizer was")

    return _svg("log-probability", "Histogram of mean log-probabilities", draw, (4.9, 3.0))


def lengths_plot(lengths: Mapping[str, Any]) -> str:
    """Draw the lengths of synthetic and of real documents, each as percent of its documents."""

    def draw(axes: Axes) -> None:
        _histograms(axes, lengths, (("real", "muted", "Real"), ("synthetic", "accent", "Synthetic, filtered")))
        axes.set_xlabel("tokens a document")
        axes.set_title("How long the documents are")
        axes.legend(loc="upper right", labelcolor=COLORS["ink"])

    return _svg("lengths", "Histogram of document lengths", draw, (4.9, 3.0))


def _histograms(axes: Axes, counts: Mapping[str, Any], series: Sequence[tuple[str, str, str]]) -> None:
    """Draw histograms of common "edges", each as percent of its sum; `series` has key, color and label of each."""
    edges = np.array(counts["edges"], np.float64)
    for key, color, label in series:
        shares = np.array(counts[key], np.float64)
        axes.stairs(shares / max(shares.sum(), 1) * 100, edges, fill=True, color=COLORS[color], alpha=0.45, label=label)
    axes.set_ylabel("percent in each bin")


def _svg(name: str, description: str, draw: Callable[[Axes], None], inches: tuple[float, float]) -> str:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _inline(text.getvalue(), name, description)


def _inline(svg: str, name: str, description: str) -> str:
    """Return an SVG file as an element of an HTML page: no prologue, unique ids, the page's colors and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg.replace("xlink:href", "href"))
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"font: (\S+) [^;\"]*|font-family: [^;\"]*", lambda match: f"font-size: {match[1]}" if match[1] else "", svg)
    for color, placeholder in COLORS.items():
        svg = svg.replace(placeholder, f"var(--{color})")
    svg = re.sub(r"#08([0-9a-f]{4})\b", lambda match: f"var(--arm-{int(match[1], 16)})", svg)
    width, height = (re.search(rf'<svg[^>]* {side}="([\d.]+)pt"', svg)[1] for side in ("width", "height"))  # type: ignore[index]
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{description}">'
    return re.sub(r"<svg[^>]*>", opening, svg, count=1)
