"""Rows of the table of launch configurations from the record of a sweep."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sbp_kernels import _tuned

Row = dict[str, Any]
TITLE = re.compile(r"(\d+) x (\d+), (\d+) warps, (\d+) stages")  # as `bench.tune.candidates.title` writes it
KEY = ("capability", "width", "dtype", "distribution")


def measured_rows(record: Mapping[str, Any]) -> list[Row]:
    """Return a row for each width and distribution of which all three kernels were measured: the fastest launches.

    The forward and the dQ kernel walk the same tiles, so the rows of these are those at which both together take least.
    """
    medians: dict[tuple[Any, ...], dict[str, dict[str, float]]] = {}
    for case in record["cases"]:
        if "seconds" in case:
            shape = case["shape"]
            key = shape["capability"], shape["width"], "bfloat16", shape["distribution"]
            medians.setdefault(key, {})[shape["kernel"]] = {name: quartiles[1] for name, quartiles in case["seconds"].items()}
    environment = record["environment"]
    provenance = {"measured": True, "device": environment["device"], "commit": environment["commit"] or None}
    return [
        dict(zip(KEY, key, strict=True)) | fastest(seconds) | provenance
        for key, seconds in medians.items()
        if seconds.keys() >= set(_tuned.KERNELS)
    ]


def fastest(seconds: Mapping[str, Mapping[str, float]]) -> Row:
    """Return the sizes and launches that take least, from seconds by kernel and title."""
    best: dict[str, dict[int, tuple[float, Row]]] = {}  # kernel -> rows of a tile -> seconds and launch
    for kernel, by_title in seconds.items():
        for title, value in by_title.items():
            match = TITLE.fullmatch(title)
            if match is None:
                raise ValueError(f"{title!r} names no launch of {kernel}")
            rows, step, warps, stages = map(int, match.groups())
            known = best.setdefault(kernel, {})
            if rows not in known or value < known[rows][0]:
                known[rows] = value, {"step": step, "warps": warps, "stages": stages}
    forward, dq, dk_dv = (best[kernel] for kernel in _tuned.KERNELS)
    shared = forward.keys() & dq.keys()
    if not shared:
        raise ValueError("no tiles were measured with both the forward and the dQ kernel")
    query_rows = min(shared, key=lambda rows: forward[rows][0] + dq[rows][0])
    key_rows = min(dk_dv, key=lambda rows: dk_dv[rows][0])
    launches = {"forward": forward[query_rows][1], "dq": dq[query_rows][1], "dk_dv": dk_dv[key_rows][1]}
    return {"query_rows": query_rows, "key_rows": key_rows, **launches}


def merged(table: Iterable[Row], rows: Iterable[Row]) -> list[Row]:
    """Return the table with these rows in place of those with the same key, and new ones at its end."""
    by_key = {tuple(row[name] for name in KEY): row for row in (*table, *rows)}
    return list(by_key.values())


def write(path: Path, rows: Iterable[Row]) -> None:
    """Check the rows and write them, one a line, in one step.

    Raises:
        ValueError: a row is not one of a table.
    """
    rows = list(rows)
    _tuned.parsed(rows)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(" " + json.dumps(row) for row in rows) + "\n]\n")
    os.replace(temporary, path)
