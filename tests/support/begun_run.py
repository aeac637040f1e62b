"""A fabricated run that has begun: some stages done, one half done, the others waiting; its samples are hostile text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fabricated_run import write_run
from fabricated_texts import HOSTILE, prose

from sbp_fast.pipeline.manifest import CLOCK, MANIFEST, PLAN
from sbp_fast.pipeline.seals import write_sealed_json

BEGUN, WAITING = "train/sbp", ("evaluate", "compare", "quality", "relation", "train/oracle")
SECONDS, STEPS_OF_ALL = 600.0, 40  # of work on the begun stage; steps that it has logged, of the 120 of a fabricated training


def write_begun_run(directory: Path) -> Path:
    """A fabricated run up to a third of `train/sbp`."""
    write_run(directory)
    for path in (path for name in WAITING for path in directory.glob(f"{name}*")):
        shutil.rmtree(path)
    for path in directory.glob("train/sbp-seed-*"):
        shutil.rmtree(path)
    partial = directory / f"{BEGUN}.partial"
    (directory / BEGUN).rename(partial)
    (partial / MANIFEST).unlink()
    write_sealed_json(partial / PLAN, {"stage": "train", "config": {}, "inputs": {}})
    write_sealed_json(partial / CLOCK, {"seconds": SECONDS})
    samples = [
        {"step": step, "seed": seed, "text": text, "stop": "length"}
        for step in (19, 39)
        for seed, text in ((None, f"{HOSTILE} {prose(step)}"), (HOSTILE, prose(step + 1)))
    ]
    (partial / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return directory


def keep_lines(path: Path, count: int, more: str = "") -> None:
    """Cut a file to its first lines, and append a text."""
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]) + more)
