"""`python -m bench.readme`: draw the tables of README.md, of pages in docs/ and of bench/README.md from committed results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.records import RESULTS, load, third_party, title
from bench.registry import BENCHMARKS
from bench.walkthrough import read_record, walkthrough_table
from sbp_fast.experiment.report.wording import enumerate_names, headline, main_metrics
from sbp_fast.lab.page import TITLES
from sbp_fast.lab.sweeps import LABELS
from sbp_fast.pipeline.progress import short

ROOT = Path(__file__).parent.parent
DEMO, LAB = ROOT / "docs" / "demo" / "results.json", ROOT / "docs" / "lab" / "results.json"


class Table(NamedTuple):
    """A table that stands in a page between two marks.

    Attributes:
        page: path from the root of the repository.
        name: of the marks.
        draw: function that returns the table as Markdown.
    """

    page: str
    name: str
    draw: Callable[[], str]

    @property
    def marks(self) -> tuple[str, str]:
        """The comments between which it stands."""
        return f"<!-- {self.name} table: drawn by `python -m bench.readme` -->", f"<!-- end of {self.name} table -->"


TABLES = (
    Table("README.md", "demo", lambda: demo_table(json.loads(DEMO.read_text()))),
    Table("docs/lab.md", "lab", lambda: lab_table(json.loads(LAB.read_text()))),
    Table("docs/how-to/own-corpus.md", "stages", lambda: walkthrough_table(read_record())),
    Table("bench/README.md", "kernel", lambda: kernel_table(RESULTS)),
    Table("bench/README.md", "step", lambda: step_table(RESULTS)),
    Table("bench/README.md", "data", lambda: data_table(RESULTS)),
    Table("bench/README.md", "scale", lambda: scale_table(RESULTS)),
)


def main() -> None:
    """Write every page with its tables drawn anew."""
    for path, text in pages().items():
        path.write_text(text)


def pages() -> dict[Path, str]:
    """Return the pages that hold tables, by path, with the tables as the committed results have them."""
    texts = {ROOT / table.page: (ROOT / table.page).read_text() for table in TABLES}
    for table in TABLES:
        path = ROOT / table.page
        texts[path] = _between(texts[path], table.marks, table.draw())
    return texts


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
    sentences = f"{results['confidence']:.0%} intervals over {over}; chance is {chance}; its stages take {minutes:.1f} minutes"
    note = f"{conclusion}{sentences} on {device}."
    return "\n".join([*lines, "", *headline(results), "", note])


def lab_table(results: dict[str, Any]) -> str:
    """Return the excess of each arm in each world, the gates, and SBP's excess by what was swept, as Markdown."""
    worlds = results["worlds"]
    lines = ["| arm | " + " | ".join(TITLES[kind] for kind in worlds) + " |", "|---|" + "---|" * len(worlds)]
    arms = {arm: world["arms"][arm]["label"] for world in worlds.values() for arm in world["arms"]}
    for arm, label in arms.items():
        lines.append(f"| {label} | " + " | ".join(_nats(world["arms"][arm]["excess"]) for world in worlds.values()) + " |")
    lines += ["", *(line for kind, world in worlds.items() for line in (_differences(kind, world), _gates(kind, world)))]
    for setting, points in results["sweeps"].items():
        lines += ["", f"| {LABELS[setting]} | SBP | exact: knowing nothing | synthesizer | exact |", "|---|---|---|---|---|"]
        lines += [
            f"| {point['value']:.10g} | {_nats(point['excess'])} | {point['bounds']['knowing_nothing']:.2f} "
            f"| {_nats(point['conditional'])} | {point['exact']['value']:.2f} |"
            for point in points
        ]
    seeds = max(len(world["seeds"]) for world in worlds.values())
    note = f"Nats a value over the entropy, mean of {seeds} seeds with {results['confidence']:.0%} t intervals over seeds."
    return "\n".join([*lines, "", note])


def _differences(kind: str, world: Mapping[str, Any]) -> str:
    arms = world["arms"]
    differences = [f"{arms[arm]['label'].lower()} {_nats(difference)}" for arm, difference in world["differences"].items()]
    ahead = [arms[arm]["label"].lower() for arm in world["ahead"]]
    verdict = f"is ahead of {enumerate_names(ahead)}, and the intervals do not touch" if ahead else "is ahead of no arm"
    return f"- `{kind}`: SBP {verdict}. SBP less each control: {', '.join(differences)}."


def _gates(kind: str, world: Mapping[str, Any]) -> str:
    related, random = world["synthesizer"], world["random_synthesizer"]
    right = {source: samples["missing_right_values"] for source, samples in world["samples"].items()}
    shares = ", ".join(f"{source} {'none' if share is None else f'{share:.1%}'}" for source, share in right.items())
    return (
        f"- `{kind}`: the synthesizer's conditional loss is {_nats(related['conditional'])}, {_nats(related['ratio'])} times "
        f"the exact one; that of random pairs is {_nats(random['conditional'])}. Right values among samples of the missing "
        f"kind, by source: {shares} (chance {world['samples']['related']['chance']:.1%})."
    )


def _nats(interval: Mapping[str, Any]) -> str:
    ends = "" if interval["low"] is None else f" [{interval['low']:.2f}, {interval['high']:.2f}]"
    return f"{interval['value']:.2f}{ends}"


def kernel_table(folder: Path) -> str:
    """Return every case whose check held, of each measured device, beside the fastest third-party backend."""
    lines = ["| device | benchmark | case | ours | fastest third-party backend | speed-up |", "|---|---|---|---|---|---|"]
    records = _records(folder, "kernels")
    for record in records:
        lines += _rows(record)
    if not any("cuda" in record["environment"] for record in records):
        lines.append("| any GPU | all | | not measured | | |")
    return "\n".join(lines)


def step_table(folder: Path) -> str:
    """Return every training step of each measured device beside all other ways, and what the counted work would give."""
    lines = ["| device | case | ours | speed-up over | by counted work |", "|---|---|---|---|---|"]
    for record in _records(folder, "steps"):
        for case in record["cases"]:
            if case["check"]["right"]:
                ratios = "; ".join(
                    f"{name.removeprefix('ours, ')} {_interval(ends)}" for name, ends in case["speed_up"].items()
                )
                counted = case["statistics"].get("counted speed-up")
                cells = [record["environment"]["device"], title(case), _rate(case), ratios, f"{counted:.2f}" if counted else ""]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines if len(lines) > 2 else [*lines, "| any | all | not measured | | |"])


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


def scale_table(folder: Path) -> str:
    """Return the CPU seconds and the peak memory of each data stage at each number of documents, of each measured device."""
    lines = ["| device | stage | documents | CPU seconds | for each million | peak GiB |", "|---|---|---|---|---|---|"]
    for record in _records(folder, "scale"):
        for case in record["cases"]:
            seconds, documents = case["seconds"]["ours"][1], case["shape"]["documents"]
            figures = [
                f"{documents:,}",
                f"{seconds:,.0f}",
                f"{seconds * 1e6 / documents:,.0f}",
                f"{case['statistics']['peak GiB']:.2f}",
            ]
            lines.append(f"| {record['environment']['device']} | {case['shape']['stage']} | {' | '.join(figures)} |")
    return "\n".join(lines if len(lines) > 2 else [*lines, "| any | all | | not measured | | |"])


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
        device, name = record["environment"]["device"], record["operation"]
        yield f"| {device} | {name} | {title(case)} | {_rate(case)} | {fastest} | {_interval(case['speed_up'][fastest])} |"


def _interval(ends: Sequence[float]) -> str:
    low, middle, high = ends
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _figure(interval: dict[str, Any], metric: Mapping[str, Any]) -> str:
    scale, unit = (100, "%") if metric["percent"] else (1, "")
    value, low, high = (f"{interval[key] * scale:.{metric['digits']}f}{unit}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main()
