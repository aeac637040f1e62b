"""`python -m bench.plot`: draw what lies under bench/results/<device>/, from the JSON alone."""

from __future__ import annotations

import json
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from bench.records import RESULTS, peers_of

PARITY = 1.0
BESIDE: dict[str, Any] = {"fontsize": 7, "loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}  # where it hides no figure
plt.rcParams["svg.hashsalt"] = "sbp-fast"  # the same figures give the same file


def main() -> None:
    for path in sorted(RESULTS.glob("*/*.json")):
        record = json.loads(path.read_text())
        for kind, draw in (("ratio", draw_ratios), ("roofline", draw_roofline)):
            figure = draw(record)
            if figure is not None:
                target = path.with_name(f"{path.stem}-{kind}.svg")
                figure.savefig(target, bbox_inches="tight", metadata={"Date": None})
                plt.close(figure)
                print(target)


def measured(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases whose check held, and that have a peer."""
    return [case for case in record["cases"] if case["check"]["right"] and peers_of(case)]


def framed(record: dict[str, Any], cases: list[dict[str, Any]]) -> tuple[Any, Any]:
    """A figure and axes with a row for each case."""
    figure, axes = plt.subplots(figsize=(8, 1 + 0.32 * len(cases)))
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    axes.set_yticks(range(len(cases)), [title_of(case) for case in cases], fontsize=7)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_title(f"{record['operation']} on {record['environment']['device']}", fontsize=10)
    return figure, axes


def title_of(case: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in case["shape"].items())


def draw_ratios(record: dict[str, Any]) -> Any:
    """How many times as fast ours is as each peer: the median, and a line from the first quartile to the third."""
    cases = measured(record)
    if not cases:
        return None
    peers = list(dict.fromkeys(peer for case in cases for peer in peers_of(case)))
    figure, axes = framed(record, cases)
    for peer in peers:
        rows = [(index, case["speed_up"][peer]) for index, case in enumerate(cases) if peer in case["speed_up"]]
        middle = [ratio[1] for _, ratio in rows]
        spread = [[ratio[1] - ratio[0] for _, ratio in rows], [ratio[2] - ratio[1] for _, ratio in rows]]
        axes.errorbar(middle, [index for index, _ in rows], xerr=spread, fmt="o", markersize=4, capsize=2, label=peer)
    axes.axvline(PARITY, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("ours is this many times as fast (right of the line: faster)")
    axes.legend(**BESIDE)
    return figure


def draw_roofline(record: dict[str, Any]) -> Any:
    """Share of the physical limit that each provider reaches: FLOPs over the measured product's rate, bytes over the copy's."""
    cases = [case for case in measured(record) if case["flops"] or case["bytes"]]
    if not cases:
        return None
    providers = list(dict.fromkeys(name for case in cases for name in case["seconds"]))
    figure, axes = framed(record, cases)
    for name in providers:
        rows = [(index, case) for index, case in enumerate(cases) if name in case["seconds"]]
        shares = [limit(case) / case["seconds"][name][1] for _, case in rows]
        axes.plot(shares, [index for index, _ in rows], "o", markersize=4, label=name)
    axes.set_xlim(0, None)
    axes.set_xlabel("share of the limit: useful work at the measured rate of a matrix product or of a copy")
    axes.legend(**BESIDE)
    return figure


def limit(case: dict[str, Any]) -> float:
    """Seconds that the useful work takes at the measured rates."""
    return max(case["flops"] / case["limits"]["flops"], case["bytes"] / case["limits"]["bytes"])


if __name__ == "__main__":
    main()
