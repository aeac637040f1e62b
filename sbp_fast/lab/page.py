"""The lab's page: one self-contained `report.html` made from `results.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbp_fast.experiment.report.templates import page_environment
from sbp_fast.lab.results import sentences
from sbp_fast.lab.sweeps import LABELS
from sbp_fast.pipeline.files import atomic_open, read_json

RESULTS, REPORT = "results.json", "report.html"
WIDTH, LEFT, RIGHT, ROW, TOP = 720, 190, 20, 30, 54
"""Of the drawing, in pixels: its width, its margins, the height of a row, and where the first row begins."""
BOUND_LABELS = {"two_tellings": "told twice", "one_telling": "told once", "knowing_nothing": "knowing nothing"}
TITLES = {"two-names": "Two names: the relation must pay", "shared-name": "A shared name: it must not"}


def write_page(directory: Path) -> Path:
    """Write `report.html` from the `results.json` in a directory; returns its path."""
    results = read_json(directory / RESULTS)
    environment = page_environment("sbp_fast.lab")
    environment.filters |= {
        "nats": lambda value: f"{value:.3f}",
        "percent": lambda value: "none" if value is None else f"{value:.1%}",
    }
    page = environment.get_template("page.html.jinja").render(
        results=results,
        sentences=sentences(results),
        drawings={kind: world_drawing(world) for kind, world in results["worlds"].items()},
        sweep_drawings={setting: sweep_drawing(points) for setting, points in results["sweeps"].items()},
        sweep_labels=LABELS,
        titles=TITLES,
        bound_labels=BOUND_LABELS,
    )
    with atomic_open(directory / REPORT) as file:
        file.write(page.encode())
    return directory / REPORT


def world_drawing(world: Mapping[str, Any]) -> dict[str, Any]:
    """Return the drawing of a world's arms, the best first, with the exact bounds as lines."""
    arms = sorted(world["arms"].values(), key=lambda arm: arm["excess"]["value"])
    return drawing([(arm["label"], arm["excess"]) for arm in arms], {name: world["bounds"][name] for name in BOUND_LABELS})


def sweep_drawing(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the drawing of what SBP reaches at each value; exact bounds that are the same at all values are lines."""
    bounds = {name: points[0]["bounds"][name] for name in BOUND_LABELS}
    common = {name: bound for name, bound in bounds.items() if all(point["bounds"][name] == bound for point in points)}
    return drawing([(f"{point['value']:.10g}", point["excess"]) for point in points], common)


def drawing(rows: Sequence[tuple[str, Mapping[str, Any]]], bounds: Mapping[str, float]) -> dict[str, Any]:
    """Return the positions, in pixels, of labelled intervals and of bounds on one axis that begins at zero."""
    excesses = [excess for _, excess in rows]
    highs = [excess["high"] for excess in excesses if excess["high"] is not None]
    largest = 1.02 * max([*bounds.values(), *highs, *(value for excess in excesses for value in excess["seeds"])])

    def x(value: float) -> float:
        return round(LEFT + max(0.0, min(value, largest)) / largest * (WIDTH - LEFT - RIGHT), 1)

    step = next(step for step in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, largest) if largest / step <= 8)
    drawn = []
    for number, (label, excess) in enumerate(rows):
        ends = None if excess["low"] is None else (x(excess["low"]), x(excess["high"]))
        y = TOP + ROW * number + ROW / 2
        seeds = [x(value) for value in excess["seeds"]]
        drawn.append({"label": label, "y": y, "value": x(excess["value"]), "ends": ends, "seeds": seeds})
    return {
        "width": WIDTH,
        "height": TOP + ROW * len(rows) + 30,
        "bottom": TOP + ROW * len(rows),
        "rows": drawn,
        "bounds": [(BOUND_LABELS[name], x(value), 14 + 12 * number) for number, (name, value) in enumerate(bounds.items())],
        "ticks": [(f"{step * n:g}", x(step * n)) for n in range(int(largest / step) + 1)],
    }
