"""Where results are kept: `<folder>/<device>/<operation>.json`, written whole as they come."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import machine

RESULTS = Path(__file__).parent / "results"


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """With the options that every program of measurements has."""
    found = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    found.add_argument("--budget", type=float, default=float("inf"), help="seconds in all; the important cases come first")
    found.add_argument("--out", type=Path, default=RESULTS, help="folder of the results; default: bench/results")
    return found


def record_of(operation: str) -> dict[str, Any]:
    """A record without cases yet."""
    return {"operation": operation, "environment": machine.environment(), "cases": []}


def path_of(folder: Path, operation: str) -> Path:
    """Where the results of an operation on this device go; its folder is made."""
    device = folder / re.sub(r"\W+", "-", machine.device_name()).strip("-").lower()
    device.mkdir(parents=True, exist_ok=True)
    return device / f"{operation}.json"


def save(path: Path, record: Mapping[str, Any]) -> None:
    """Write what is measured so far; a reader never sees half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def peers_of(case: dict[str, Any]) -> list[str]:
    """The providers of a measured case that are not ours in another form."""
    return [name for name in case.get("speed_up", ()) if not name.startswith("ours")]
