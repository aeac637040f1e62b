"""`python -m bench.walkthrough RUN`: record what the run of docs/how-to/own-corpus.md took and made, for its table."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from sbp_fast.pipeline.manifest import Manifest

RECORD = Path(__file__).parent.parent / "docs" / "how-to" / "own-corpus.json"
COUNTS = {
    "prepare": ("documents", "unique_documents", "heldout_documents", "vocabulary_size"),
    "pair/related": ("pairs", "seeds"),
    "synthesize/related": ("documents",),
    "filter/related": ("filtered_documents",),
}
RESULTS = {
    "prepare": "{documents:,} passages, {unique_documents:,} of them unique documents, and {heldout_documents:,} held out",
    "pair": "{pairs:,} pairs of {seeds:,} seeds",
    "synthesize": "{documents:,} documents",
    "filter": "{filtered_documents:,} documents are left",
}


def record(run: Path) -> dict[str, Any]:
    """Return seconds and counts of a finished run that was not interrupted.

    Args:
        run: its directory, as the run left it: the time that it took is that between the first and the last file written.
    """
    results = json.loads((run / "results.json").read_text("utf-8"))
    return {
        "device": results["run"]["device"],
        "versions": results["run"]["versions"],
        "elapsed_seconds": round((run / "results.json").stat().st_mtime - (run / "config.toml").stat().st_mtime),
        "seconds": {line["stage"]: round(line["seconds"], 1) for line in results["ledger"]},
        "counts": {stage: {name: Manifest.load(run / stage).counts[name] for name in names} for stage, names in COUNTS.items()},
    }


def walkthrough_table(recorded: dict[str, Any]) -> str:
    """Return the stages with their seconds and what they made, as Markdown; stages of the same command are one row."""
    rows: defaultdict[str, list[float]] = defaultdict(list)
    for stage, seconds in recorded["seconds"].items():
        rows[stage.partition("/")[0]].append(seconds)
    counts = {stage.partition("/")[0]: values for stage, values in recorded["counts"].items()}
    lines = ["| stage | times | seconds in all | result |", "|---|---|---|---|"]
    for command, seconds in rows.items():
        result = RESULTS[command].format(**counts[command]) if command in RESULTS else ""
        lines.append(f"| `{command}` | {len(seconds)} | {sum(seconds):.0f} | {result} |")
    elapsed, versions = recorded["elapsed_seconds"] / 60, recorded["versions"]
    note = f"{elapsed:.1f} minutes from the first file to the report, two stages at a time"
    return "\n".join([*lines, "", f"{note}, on {recorded['device']} with torch {versions['torch']}."])


def main() -> None:
    """Write the record of a run."""
    parser = argparse.ArgumentParser(prog="python -m bench.walkthrough", description=__doc__)
    parser.add_argument("run", type=Path, help="directory of the finished run")
    RECORD.write_text(json.dumps(record(parser.parse_args().run), indent=2) + "\n")


if __name__ == "__main__":
    main()
