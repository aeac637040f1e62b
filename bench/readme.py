"""Draw the README's tables from committed results: `python -m bench.readme`, never by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.records import peers_of

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DEMO = ROOT / "docs" / "demo" / "results.json"
RESULTS = ROOT / "bench" / "results"
DEMO_MARKS = "<!-- demo table: drawn by `python -m bench.readme` -->", "<!-- end of demo table -->"
KERNEL_MARKS = "<!-- kernel table: drawn by `python -m bench.readme` -->", "<!-- end of kernel table -->"
DATA_MARKS = "<!-- data table: drawn by `python -m bench.readme` -->", "<!-- end of data table -->"
METRICS = {
    "heldout_bits_per_byte": "held-out bits per byte (lower is better)",
    "continuation_accuracy": "four-way continuation",
    "capital_accuracy": "capital questions",
}
OPERATIONS = ("attention", "loss", "small", "generation")
DATA_OPERATIONS = ("corpus", "pairs")


def main() -> None:
    README.write_text(drawn(README.read_text()))


def drawn(text: str) -> str:
    """`text` with all tables as the committed results have them."""
    text = _between(text, DEMO_MARKS, demo_table(json.loads(DEMO.read_text())))
    text = _between(text, KERNEL_MARKS, kernel_table(RESULTS))
    return _between(text, DATA_MARKS, data_table(RESULTS))


def _between(text: str, marks: tuple[str, str], table: str) -> str:
    begin, end = marks
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def demo_table(results: dict[str, Any]) -> str:
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


def kernel_table(folder: Path) -> str:
    """For each device that was measured: every case whose answers were right, beside the fastest of its peers."""
    lines = ["| device | operation | case | ours | fastest peer | ours is as fast as it, times |", "|---|---|---|---|---|---|"]
    records = _records(folder, OPERATIONS)
    for record in records:
        lines += _rows(record)
    if not any("cuda" in record["environment"] for record in records):
        lines.append("| any GPU | all | | not measured | | |")
    return "\n".join(lines)


def data_table(folder: Path) -> str:
    """For each device that was measured: every case with all of its peers."""
    lines = ["| device | case | ours | as fast as, times |", "|---|---|---|---|"]
    for record in _records(folder, DATA_OPERATIONS):
        for case in record["cases"]:
            if peers := peers_of(case):
                ratios = "; ".join(f"{peer} {case['speed_up'][peer][1]:.2f}" for peer in peers)
                lines.append(f"| {record['environment']['device']} | {_shape(case)} | {_rate(case)} | {ratios} |")
    return "\n".join(lines)


def _records(folder: Path, operations: Sequence[str]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for name in operations for path in sorted(folder.glob(f"*/{name}.json"))]


def _shape(case: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in case["shape"].items())


def _rate(case: dict[str, Any]) -> str:
    ours = next(iter(case["seconds"]))
    return f"{case['work'] / case['seconds'][ours][1]:.3g} {case['unit']}/s"


def _rows(record: dict[str, Any]) -> Iterator[str]:
    for case in record["cases"]:
        peers = peers_of(case)
        if not case["check"]["right"] or not peers:
            continue
        peer = min(peers, key=lambda name: case["seconds"][name][1])
        low, middle, high = case["speed_up"][peer]
        device, operation = record["environment"]["device"], record["operation"]
        yield f"| {device} | {operation} | {_shape(case)} | {_rate(case)} | {peer} | {middle:.2f} ({low:.2f} to {high:.2f}) |"


def _figure(value: dict[str, float], metric: str) -> str:
    if metric.endswith("accuracy"):
        return f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


if __name__ == "__main__":
    main()
