"""The manifest of a finished stage: its files, its settings and inputs, its counts, and a hash over all of these."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sbp_fast import __version__
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import TEMPORARY_SUFFIX, read_json
from sbp_fast.pipeline.seals import SEAL_SUFFIX, is_whole, read_sealed_json, write_sealed_json

FORMAT = 3  # 1: before held-out documents were divided into validation and test documents; 2: before the hash of the manifest
MANIFEST, PLAN, CLOCK, COMPLETE, SCRATCH = "manifest.json", "plan.json", "clock.json", "complete.json", "scratch"
BOOKKEEPING = frozenset({MANIFEST, PLAN, CLOCK, COMPLETE})
"""Files of `pipeline.stage` itself, in no manifest; a kill may leave some of them in a finished output."""
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

    def write(self, directory: Path) -> None:
        """Write the manifest of a directory, atomically."""
        write_sealed_json(directory / MANIFEST, asdict(self))

    @staticmethod
    def read(directory: Path, stage: str | None = None) -> Manifest:
        """Read and check the manifest of `directory`, without its files.

        Args:
            directory: output of a finished stage.
            stage: name of the stage that must have written it; None accepts any.

        Raises:
            UserError: there is no manifest, or of another stage or format, or it is not as it was written.
        """
        path = Path(directory) / MANIFEST
        if not path.is_file():
            raise UserError(directory, "no finished stage is here", f"run the {stage or 'stage'} that writes it first")
        values = read_json(path)
        version = values.get("format") if isinstance(values, dict) else None
        if version != FORMAT:
            raise UserError(path, f"format {version} is not {FORMAT}", "rerun the stage with this version, into another --out")
        manifest = Manifest(**read_sealed_json(path, "remove its directory and rerun the stage"))
        if stage is not None and manifest.stage != stage:
            raise UserError(directory, f"holds the output of {manifest.stage}, not of {stage}", "give the right directory")
        return manifest

    @staticmethod
    def load(directory: Path, stage: str | None = None, *, hashed: bool = True) -> Manifest:
        """Read the manifest of `directory` and check each file's size and checksum.

        Args:
            directory: output of a finished stage.
            stage: name of the stage that must have written it; None accepts any.
            hashed: whether to hash the files, which may be terabytes; false where `run_stage` has just done so.

        Raises:
            UserError: what `read` refuses; a file is missing or damaged, or the manifest does not list it.
        """
        directory = Path(directory)
        manifest = Manifest.read(directory, stage)
        for file in damaged_files(directory, manifest.files, hashed=hashed):
            raise UserError(file, "missing or damaged since it was written", f"rerun the {manifest.stage} stage with --force")
        refuse_unlisted_files(directory, manifest.files)
        return manifest


def check_file(path: Path) -> None:
    """Refuse a damaged file of a finished stage; a file in another directory has nothing to be compared with.

    Raises:
        UserError: the manifest beside the file is damaged, or lists another file of that name.
    """
    if (path.parent / MANIFEST).is_file():
        manifest = Manifest.read(path.parent)
        for file in damaged_files(path.parent, {path.name: manifest.files.get(path.name, {"bytes": -1})}):
            raise UserError(file, "missing or damaged since it was written", f"rerun the {manifest.stage} stage with --force")


def output_files(directory: Path) -> Iterator[Path]:
    """Yield the files in a stage's directory that are its output: no bookkeeping, scratch, seals or temporary files."""
    for folder, folders, names in os.walk(directory):
        top = Path(folder) == directory
        if top and SCRATCH in folders:
            folders.remove(SCRATCH)
        for name in names:
            if not name.endswith((TEMPORARY_SUFFIX, SEAL_SUFFIX)) and not (top and name in BOOKKEEPING):
                yield Path(folder) / name


def damaged_files(directory: Path, files: Mapping[str, Mapping[str, Any]], *, hashed: bool = True) -> Iterator[Path]:
    """Yield the listed files that are missing or not as they were written."""
    for name, expected in files.items():
        if not is_whole(directory / name, expected, hashed=hashed):
            yield directory / name


def refuse_unlisted_files(directory: Path, files: Mapping[str, Any]) -> None:
    """Refuse a directory with files that its list does not name: nothing says where they come from.

    Raises:
        UserError: naming one.
    """
    for file in output_files(directory):
        if str(file.relative_to(directory)) not in files:
            raise UserError(file, "is not part of the output: its manifest does not list it", "move it elsewhere")
