"""Files of results: `<folder>/<device>/<benchmark>.json`, rewritten after each case.

A record holds "operation" (the name of the benchmark), "environment" and "cases". Each case holds "shape", "unit", "work",
"flops", "bytes", "roofline" (measured FLOP/s and bytes/s of the device), "statistics" and "check". Where the check holds there
are, by provider, "seconds", "speed_up" of ours over it, "memory" in bytes, "disagreement" with ours, and "left_out" with the
reason. Seconds and speed-ups are [first quartile, median, third quartile]; those of fewer than four runs are [least,
median, greatest]. On a GPU, "late_queues" counts the timings in which the host was still queueing when the device began. Where
ours or the case itself failed, the check does not hold, and "failed" says why.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

# keys of records written before version 0.2 -> keys today
RENAMED = {"limits": "roofline", "facts": "statistics"}
RENAMED_IN_SHAPE = {
    "attention": {"stream": "lengths"},
    "plan": {"stream": "lengths"},
    "order": {"stream": "sequence tokens", "streams": "sequences"},
}


def new_record(name: str, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a benchmark without cases; the environment is that of `machine.environment`."""
    return {"operation": name, "environment": dict(environment), "cases": []}


def path_of(folder: Path, name: str, device: str) -> Path:
    """Return the file for the results of a benchmark on a device of that name, and create its folder."""
    parent = folder / re.sub(r"\W+", "-", device).strip("-").lower()
    parent.mkdir(parents=True, exist_ok=True)
    return parent / f"{name}.json"


def save(path: Path, record: Mapping[str, Any]) -> None:
    """Write the record in one step: a reader never sees half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def load(path: Path) -> dict[str, Any]:
    """Read a record; keys of older versions come back under their names of today."""
    record: dict[str, Any] = json.loads(path.read_text())
    shape_keys = RENAMED_IN_SHAPE.get(record["operation"], {})
    record["cases"] = [_renamed(case, RENAMED) for case in record["cases"]]
    for case in record["cases"]:
        case["shape"] = _renamed(case["shape"], shape_keys)
    return record


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}


def title(case: Mapping[str, Any]) -> str:
    """Return the shape of a measured case in one line, without the tables of settings in it."""
    return ", ".join(f"{key} {value}" for key, value in case["shape"].items() if not isinstance(value, dict))


def third_party(case: Mapping[str, Any]) -> list[str]:
    """Return the timed providers of a measured case that are not a form of ours."""
    return [name for name in case.get("speed_up", ()) if not name.startswith("ours")]


def roofline_seconds(case: Mapping[str, Any]) -> float:
    """Return the seconds that the useful work of a measured case takes at the measured rates of the device."""
    return max(case["flops"] / case["roofline"]["flops"], case["bytes"] / case["roofline"]["bytes"])
