"""`python -m bench.readme`: draw the tables of README.md and bench/README.md from committed results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.records import RESULTS, load, third_party, title
from bench.registry import BENCHMARKS
from sbp_fast.experiment.report.wording import headline, main_metrics
from sbp_fast.pipeline.progress import short

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "docs" / "demo" / "results.json"
DEMO_MARKS = "<!-- demo table: drawn by `python -m bench.readme` -->", "<!-- end of demo table -->"
KERNEL_MARKS = "<!-- kernel table: drawn by `python -m bench.readme` -->", "<!-- end of kernel table -->"
DATA_MARKS = "<!-- data table: drawn by `python -m bench.readme` -->", "<!-- end of data table -->"


def main() -> None:
    """Write every page with its tables drawn anew."""
    for path, text in pages().items():
        path.write_text(text)


def pages() -> dict[Path, str]:
    """Return the pages that hold tables, by path, with the tables as the committed results have them."""
    readme, results = ROOT / "README.md", ROOT / "bench" / "README.md"
    demo = _between(readme.read_text(), DEMO_MARKS, demo_table(json.loads(DEMO.read_text())))
    kernels = _between(results.read_text(), KERNEL_MARKS, kernel_table(RESULTS))
    return {readme: demo, results: _between(kernels, DATA_MARKS, data_table(RESULTS))}


def _between(text: str, marks: tuple[str, str], table: str) -> str:
    """Replace what stands between the marks.

    Raises:
        ValueError: a mark is missing.
    """
    begin, end = marks
    if begin not in text or end not in text:
        raise ValueError(f"the page lacks the marks {begin} and {end}")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def demo_table(results: dict[str, Any]) -> str:
    """Return the arms side by side, each figure with its interval, as Markdown, with the outcome and where it comes from."""
    metrics = main_metrics(results["metrics"])
    heads = [f"{metric['label']} ({metric['better']} is better)" for metric in metrics.values()]
    first = ["arm", "training tokens", "real tokens it may read", "times read"]
    lines = [f"| {' | '.join([*first, *heads])} |", "|---|" + "---|" * (len(first) + len(heads) - 1)]
    for arm in results["arms"].values():
        figures = [_figure(arm[name], metric) for name, metric in metrics.items()]
        tokens = [short(arm["tokens"]), short(arm["unique_tokens"]), f"{arm['real_epochs']:.1f}"]
        lines.append(f"| {' | '.join([arm['label'], *tokens, *figures])} |")
    minutes = results["totals"]["seconds"] / 60
    chance = ", ".join(f"{metric['chance']:.0%} ({metric['label']})" for metric in metrics.values() if metric["chance"])
    device = results["run"]["device"]
    over = " or ".join(sorted({arm[name]["over"] for arm in results["arms"].values() for name in metrics}))
    single = all(arm["training_runs"] == 1 for arm in results["arms"].values())
    conclusion = "One run each, no conclusion; " if single else ""
    note = (
        f"{conclusion}{results['confidence']:.0%} intervals over {over}; chance is {chance}; its stages take {minutes:.1f} minutes on {device}."
    )
    return "\n".join([*lines, "", *headline(results), "", note])


def kernel_table(folder: Path) -> str:
    """Return every case whose check held, of each measured device, beside the fastest third-party backend."""
    lines = ["| device | benchmark | case | ours | fastest third-party backend | speed-up |", "|---|---|---|---|---|---|"]
    records = _records(folder, "kernels")
    for record in records:
        lines += _rows(record)
    if not any("cuda" in record["environment"] for record in records):
        lines.append("| any GPU | all | | not measured | | |")
    return "\n".join(lines)


def data_table(folder: Path) -> str:
    """Return every case of each measured device beside all peer libraries."""
    lines = ["| device | benchmark | case | ours | speed-up over |", "|---|---|---|---|---|"]
    for record in _records(folder, "data"):
        for case in record["cases"]:
            if libraries := third_party(case):
                ratios = "; ".join(f"{library} {case['speed_up'][library][1]:.2f}" for library in libraries)
                device, name = record["environment"]["device"], record["operation"]
                lines.append(f"| {device} | {name} | {title(case)} | {_rate(case)} | {ratios} |")
    return "\n".join(lines)


def _records(folder: Path, table: str) -> list[dict[str, Any]]:
    names = [name for name, entry in BENCHMARKS.items() if entry.table == table]
    return [load(path) for name in names for path in sorted(folder.glob(f"*/{name}.json"))]


def _rate(case: dict[str, Any]) -> str:
    ours = next(iter(case["seconds"]))
    return f"{case['work'] / case['seconds'][ours][1]:.3g} {case['unit']}/s"


def _rows(record: dict[str, Any]) -> Iterator[str]:
    for case in record["cases"]:
        backends = third_party(case)
        if not case["check"]["right"] or not backends:
            continue
        fastest = min(backends, key=lambda name: case["seconds"][name][1])
        low, middle, high = case["speed_up"][fastest]
        device, name = record["environment"]["device"], record["operation"]
        yield f"| {device} | {name} | {title(case)} | {_rate(case)} | {fastest} | {middle:.2f} ({low:.2f} to {high:.2f}) |"


def _figure(interval: dict[str, Any], metric: Mapping[str, Any]) -> str:
    scale, unit = (100, "%") if metric["percent"] else (1, "")
    value, low, high = (f"{interval[key] * scale:.{metric['digits']}f}{unit}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main()
