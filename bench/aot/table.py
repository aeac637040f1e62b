"""The committed table: `bench/results/aot.json`.

{"fingerprints": {entry: hash of what is compiled}, "figures": {release: {entry: {target: figures}}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.aot.binary import Figures
from bench.aot.compilation import Compilation
from bench.aot.verdict import failures

PATH = Path(__file__).parents[1] / "results" / "aot.json"

Rows = dict[tuple[str, str, str], Figures]  # (release, entry, target) -> figures


def read(path: Path) -> tuple[dict[str, str], Rows]:
    """Return fingerprints and figures; none where there is no table yet."""
    if not path.exists():
        return {}, {}
    record = json.loads(path.read_text())
    rows = {
        (release, name, target): figures
        for release, entries in record["figures"].items()
        for name, targets in entries.items()
        for target, figures in targets.items()
    }
    return record["fingerprints"], rows


def write(path: Path, fingerprints: Mapping[str, str], rows: Rows) -> None:
    """Write the table, one binary a line."""
    figures: dict[str, Any] = {}
    for (release, name, target), row in rows.items():
        figures.setdefault(release, {}).setdefault(name, {})[target] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_dumped({"figures": figures, "fingerprints": dict(fingerprints)}, depth=4) + "\n")


def _dumped(value: Any, *, depth: int, indent: str = "") -> str:
    """JSON, sorted, broken into lines down to `depth` levels, so that one binary is one line of a diff."""
    if not depth or not isinstance(value, dict) or not value:
        return json.dumps(value, sort_keys=True)
    inner = indent + "  "
    lines = [f"{inner}{json.dumps(key)}: {_dumped(item, depth=depth - 1, indent=inner)}" for key, item in sorted(value.items())]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def out_of_date(path: Path, compilations: Mapping[str, Compilation]) -> list[str]:
    """Return why the table does not describe the kernels as they are now, a line each, without compiling anything."""
    fingerprints, rows = read(path)
    reasons = [f"{name}: not in the table" for name in compilations if name not in fingerprints]
    reasons += [f"{name}: in the table, but no entry" for name in fingerprints if name not in compilations]
    known = {name: compilation for name, compilation in compilations.items() if name in fingerprints}
    reasons += [f"{name}: changed since" for name, it in known.items() if it.fingerprint() != fingerprints[name]]
    for release in sorted({release for release, _, _ in rows}):
        for name, compilation in known.items():
            for target in compilation.targets:
                figures = rows.get((release, name, target))
                failed = ["no figures"] if figures is None else failures(compilation, release, target, figures)
                reasons += [f"{name}, {target}, triton {release}: {line}" for line in failed]
    return reasons
