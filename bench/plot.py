"""`python -m bench.plot`: draw the results from their JSON files, as `bench/plots/<device>/<benchmark>-<kind>.svg`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from bench.records import RESULTS, load, roofline_seconds, third_party, title

PLOTS = Path(__file__).parent / "plots"
PARITY = 1.0
LEGEND: dict[str, Any] = {"fontsize": 7, "loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}  # beside the axes
plt.rcParams["svg.hashsalt"] = "sbp-fast"  # the same figures give the same file


def main() -> None:
    """Draw every record of a folder of results that has something to draw."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results; default: bench/results")
    parser.add_argument("--out", type=Path, default=PLOTS, help="folder of the pictures; default: bench/plots")
    options = parser.parse_args()
    for path in sorted(options.results.glob("*/*.json")):
        record = load(path)
        for kind, draw in (("speed-up", draw_speed_ups), ("roofline", draw_roofline)):
            figure = draw(record)
            if figure is not None:
                target = options.out / path.parent.name / f"{path.stem}-{kind}.svg"
                target.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(target, bbox_inches="tight", metadata={"Date": None})
                plt.close(figure)
                print(target)


def draw_speed_ups(record: dict[str, Any]) -> Any:
    """Draw our speed-up over each third-party provider, the median with a line between its quartiles; None without any."""
    cases = _compared(record)
    if not cases:
        return None
    names = list(dict.fromkeys(name for case in cases for name in third_party(case)))
    figure, axes = _axes(record, cases)
    for name in names:
        rows = [(index, case["speed_up"][name]) for index, case in enumerate(cases) if name in case["speed_up"]]
        medians = [ratio[1] for _, ratio in rows]
        spread = [[ratio[1] - ratio[0] for _, ratio in rows], [ratio[2] - ratio[1] for _, ratio in rows]]
        axes.errorbar(medians, [index for index, _ in rows], xerr=spread, fmt="o", markersize=4, capsize=2, label=name)
    axes.axvline(PARITY, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("speed-up of ours (right of the line: ours is faster)")
    axes.legend(**LEGEND)
    return figure


def draw_roofline(record: dict[str, Any]) -> Any:
    """Draw the share of the roofline that each provider reaches; None where no case has one."""
    cases = [case for case in _compared(record) if case["flops"] or case["bytes"]]
    if not cases:
        return None
    names = list(dict.fromkeys(name for case in cases for name in case["seconds"]))
    figure, axes = _axes(record, cases)
    for name in names:
        rows = [(index, case) for index, case in enumerate(cases) if name in case["seconds"]]
        shares = [roofline_seconds(case) / case["seconds"][name][1] for _, case in rows]
        axes.plot(shares, [index for index, _ in rows], "o", markersize=4, label=name)
    axes.set_xlim(0, None)
    axes.set_xlabel("share of the roofline: useful work at the measured rate of a matrix product or of a copy")
    axes.legend(**LEGEND)
    return figure


def _compared(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases whose check held and that have a third-party provider."""
    return [case for case in record["cases"] if case["check"]["right"] and third_party(case)]


def _axes(record: dict[str, Any], cases: list[dict[str, Any]]) -> tuple[Any, Any]:
    """A figure and axes with a row for each case."""
    figure, axes = plt.subplots(figsize=(8, 1 + 0.32 * len(cases)))
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    axes.set_yticks(range(len(cases)), [title(case) for case in cases], fontsize=7)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_title(f"{record['operation']} on {record['environment']['device']}", fontsize=10)
    return figure, axes


if __name__ == "__main__":
    main()
