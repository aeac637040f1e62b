"""The manifest of a finished stage: what its directory holds, from what it was made, and what was counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbp_fast import __version__
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import hash_file, read_json

FORMAT = 1
MANIFEST = "manifest.json"
LOGS = frozenset({"metrics.jsonl"})
"""Files with wall-clock figures: listed, but no part of the fingerprint."""


@dataclass(frozen=True)
class Manifest:
    """What the directory of a finished stage says of itself."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Input name -> fingerprint of what was read."""
    files: dict[str, dict[str, Any]]
    """Relative path -> {"bytes", "xxh3"}."""
    counts: dict[str, Any]
    """What the stage counted and measured; deterministic unless named `..._seconds`."""
    flops: float
    seconds: float
    """Wall-clock seconds at work, over all resumptions."""
    device: str
    fingerprint: str
    format: int = FORMAT
    code_version: str = __version__

    @staticmethod
    def load(directory: Path, stage: str | None = None, *, hashed: bool = True) -> Manifest:
        """Read and check `directory`: its manifest, and each file's size and checksum.

        Args:
            hashed: whether to hash the files, which may be terabytes; false where `run_stage` has just done it.

        Raises:
            UserError: no manifest, another stage's output, another format, a file missing or damaged.
        """
        path = Path(directory) / MANIFEST
        if not path.is_file():
            raise UserError(directory, "no finished stage lies here", f"run the {stage or 'stage'} that writes it first")
        values = read_json(path)
        if values.get("format") != FORMAT:
            raise UserError(path, f"format {values.get('format')} is not {FORMAT}", "rerun the stage with this version")
        manifest = Manifest(**values)
        if stage is not None and manifest.stage != stage:
            raise UserError(directory, f"holds the output of {manifest.stage}, not of {stage}", "give the right directory")
        for name, entry in manifest.files.items():
            file = Path(directory) / name
            whole = file.is_file() and file.stat().st_size == entry["bytes"]
            if not whole or (hashed and hash_file(file) != entry["xxh3"]):
                raise UserError(
                    file, "missing or damaged since it was written", f"rerun the {manifest.stage} stage with --force"
                )
        return manifest
