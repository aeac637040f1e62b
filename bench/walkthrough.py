"""`python -m bench.walkthrough DOCUMENTS FOLDER`: follow docs/how-to/own-corpus.md and record what its table shows.

The first 3,000 lines of a file of JSON lines become `my-documents.jsonl` in the folder. The run is the page's.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

from sbp_fast.pipeline.manifest import Manifest

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "own-corpus.md"
RECORD = PAGE.with_suffix(".json")
DOCUMENTS = 3000
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


def read_record() -> dict[str, Any] | None:
    """Return the committed record, or None if there is none."""
    return json.loads(RECORD.read_text("utf-8")) if RECORD.is_file() else None


def follow(documents: Path, folder: Path) -> dict[str, Any]:
    """Run what the page says in a folder, and return the seconds and counts of the run.

    Args:
        documents: JSON lines with a "text".
        folder: an empty or missing one; the documents, the settings and the run stay in it.

    Raises:
        CalledProcessError: the run failed.
    """
    text = PAGE.read_text("utf-8")
    (settings,) = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"^sbp-fast (run .*--side-by-side .*)$", text, re.MULTILINE)
    folder.mkdir(parents=True, exist_ok=True)
    with open(documents, encoding="utf-8") as lines:
        (folder / "my-documents.jsonl").write_text("".join(islice(lines, DOCUMENTS)), "utf-8")
    (folder / "mine.toml").write_text(settings, "utf-8")
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "sbp_fast", *shlex.split(command)], cwd=folder, check=True)
    elapsed, usage = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "elapsed_seconds": round(elapsed),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
        **read(folder / "runs/mine"),
    }


def read(run: Path) -> dict[str, Any]:
    """Return what a finished run says of itself: device, versions, the seconds of each stage, and counts."""
    results = json.loads((run / "results.json").read_text("utf-8"))
    return {
        "device": results["run"]["device"],
        "versions": results["run"]["versions"],
        "seconds": {line["stage"]: round(line["seconds"], 1) for line in results["ledger"]},
        "counts": {stage: {name: Manifest.load(run / stage).counts[name] for name in names} for stage, names in COUNTS.items()},
    }


def walkthrough_table(recorded: dict[str, Any] | None) -> str:
    """Return the stages with their seconds and what they made, as Markdown; stages of the same command are one row.

    Args:
        recorded: as `follow` returns it, or None if the page has not been followed to its end.
    """
    if recorded is None:
        return "How long the stages take has not been measured."
    rows: defaultdict[str, list[float]] = defaultdict(list)
    for stage, seconds in recorded["seconds"].items():
        rows[stage.partition("/")[0]].append(seconds)
    counts = {stage.partition("/")[0]: values for stage, values in recorded["counts"].items()}
    lines = ["| stage | times | seconds in all | result |", "|---|---|---|---|"]
    for command, seconds in rows.items():
        result = RESULTS[command].format(**counts[command]) if command in RESULTS else ""
        lines.append(f"| `{command}` | {len(seconds)} | {sum(seconds):.0f} | {result} |")
    elapsed, cores = recorded["elapsed_seconds"], recorded["cpu_seconds"] / recorded["elapsed_seconds"]
    took = f"{elapsed / 60:.1f} minutes from the start to the report, in which the run had {cores:.1f} cores of the machine"
    return "\n".join([*lines, "", f"{took}, {recorded['device']} with torch {recorded['versions']['torch']}."])


def main() -> None:
    """Follow the page and write the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.walkthrough", description=__doc__)
    parser.add_argument("documents", type=Path, help="JSON lines with a text")
    parser.add_argument("folder", type=Path, help="where the run is made and stays")
    arguments = parser.parse_args()
    RECORD.write_text(json.dumps(follow(arguments.documents, arguments.folder), indent=2) + "\n")


if __name__ == "__main__":
    main()
