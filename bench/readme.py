"""Draw the README's table of the demo from the committed results: `python -m bench.readme`, never by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "demo" / "results.json"
BEGIN, END = "<!-- demo table: drawn by `python -m bench.readme` -->", "<!-- end of demo table -->"
METRICS = {
    "heldout_bits_per_byte": "held-out bits per byte (lower is better)",
    "continuation_accuracy": "four-way continuation",
    "capital_accuracy": "capital questions",
}


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), json.loads(RESULTS.read_text())))


def with_table(text: str, results: dict[str, Any]) -> str:
    """`text` with what stands between the two marks replaced by the table of `results`."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def table(results: dict[str, Any]) -> str:
    """The arms side by side, each figure with its interval, as a Markdown table with a line on where it comes from."""
    lines = ["| arm | training tokens | " + " | ".join(METRICS.values()) + " |", "|---|---|" + "---|" * len(METRICS)]
    for name, arm in results["arms"].items():
        figures = [_figure(arm[metric], metric) for metric in METRICS]
        lines.append(f"| {name} | {arm['tokens'] / 1e6:.2f}M | " + " | ".join(figures) + " |")
    minutes = results["totals"]["seconds"] / 60
    chance = ", ".join(f"{results['arms']['baseline'][metric]['chance']:.0%}" for metric in list(METRICS)[1:])
    device = results["run"]["device"]
    note = f"{results['confidence']:.0%} bootstrap intervals; chance is {chance}; {minutes:.1f} minutes on {device}."
    return "\n".join([*lines, "", note])


def _figure(value: dict[str, float], metric: str) -> str:
    if metric.endswith("accuracy"):
        return f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


if __name__ == "__main__":
    main()
