"""The manifest of a finished stage: its files, its settings and inputs, and its counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbp_fast import __version__
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import hash_file, read_json

FORMAT = 2  # 1: before held-out documents were divided into validation and test documents
MANIFEST = "manifest.json"
LOGS = frozenset({"metrics.jsonl", "samples.jsonl"})
"""Files that describe how the work went: listed, but not part of the fingerprint, as settings without effect change them."""


@dataclass(frozen=True)
class Manifest:
    """Content of the manifest file in the directory of a finished stage."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Input name -> fingerprint of the input."""
    files: dict[str, dict[str, Any]]
    """Relative path -> {"bytes", "xxh3"}."""
    counts: dict[str, Any]
    """Counts and measurements of the stage; deterministic unless named `..._seconds`."""
    flops: float
    seconds: float
    """Wall-clock seconds of the work, over all attempts."""
    device: str
    fingerprint: str
    format: int = FORMAT
    code_version: str = __version__

    @staticmethod
    def load(directory: Path, stage: str | None = None, *, hashed: bool = True) -> Manifest:
        """Read the manifest of `directory` and check each file's size and checksum.

        Args:
            directory: output of a finished stage.
            stage: name of the stage that must have written it; None accepts any.
            hashed: whether to hash the files, which may be terabytes; false where `run_stage` has just done so.

        Raises:
            UserError: there is no manifest, or of another stage or format; a file is missing or damaged.
        """
        path = Path(directory) / MANIFEST
        if not path.is_file():
            raise UserError(directory, "no finished stage is here", f"run the {stage or 'stage'} that writes it first")
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
