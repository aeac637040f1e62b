"""Packing a prepared folder, and unpacking it on the GPU machine, which has only Python.

A folder holds wheels in `wheels/`, a compile cache of Triton in `triton-cache.tar.xz`, and in `prepared.json` the versions that
both are for. A wheel that is too large for one folder lies in two of them, in parts.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CACHE, WHEELS, VERSIONS = "triton-cache.tar.xz", "wheels", "prepared.json"
LIMIT = 60 << 20  # bytes of one folder


class NotPreparedForThis(Exception):
    """The folder is for other versions than this machine has; the message names both."""


def versions() -> dict[str, str]:
    """Return what wheels and compiled kernels depend on, as this interpreter has it."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"python": ".".join(platform.python_version_tuple()[:2]), "machine": platform.machine(), "triton": triton}


def pack_cache(cache: Path, folder: Path) -> int:
    """Write the cache into the folder, compressed, and return the number of its entries."""
    with tarfile.open(folder / CACHE, "w:xz") as archive:
        archive.add(cache, arcname=".", filter=lambda entry: None if entry.name.endswith("/lock") else entry)
    return len(list(cache.iterdir()))


def split_wheel(wheel: Path, folders: Sequence[Path]) -> None:
    """Share out a wheel as "NAME.whl.1", "NAME.whl.2" and so on, so that all folders get the same size, and remove it."""
    content = wheel.read_bytes()
    wheel.unlink()
    share = -(-(len(content) + sum(map(size, folders))) // len(folders))
    for number, folder in enumerate(folders, 1):
        part, content = content[: share - size(folder)], content[share - size(folder) :]
        (folder / f"{wheel.name}.{number}").write_bytes(part)


def unpack(folders: Sequence[Path], target: Path) -> dict[str, str]:
    """Unpack prepared folders into one target, unless they are there already.

    Returns:
        Environment variables with which Python finds the packages and Triton the cache.

    Raises:
        NotPreparedForThis: a folder is for another Python or triton.
    """
    for folder in folders:
        meant = json.loads((folder / VERSIONS).read_text())
        if meant != versions():
            raise NotPreparedForThis(
                f"{folder} is for {_listed(meant)}; here are {_listed(versions())}: make it anew for these"
            )
    packages, cache = target / "packages", target / "triton-cache"
    if not target.is_dir():
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        unpack_wheels(folders, partial / packages.name)
        for folder in folders:
            if (folder / CACHE).exists():
                with tarfile.open(folder / CACHE) as archive:
                    archive.extractall(partial / cache.name, filter="data")
                relocate(partial / cache.name, cache)
        partial.rename(target)
    return {"PYTHONPATH": _import_path(packages)} | ({"TRITON_CACHE_DIR": str(cache)} if cache.is_dir() else {})


def unpack_wheels(folders: Sequence[Path], packages: Path) -> Path:
    """Unpack the wheels of the folders, parts joined, into a folder that Python finds with PYTHONPATH, and return it."""
    packages.mkdir(parents=True)
    files = [path for folder in folders for path in sorted((folder / WHEELS).iterdir())]
    names = {path.name[: path.name.index(".whl") + 4] for path in files}
    for name in sorted(names):
        wheel = packages / name
        with wheel.open("wb") as joined:
            for path in sorted((path for path in files if path.name.startswith(name)), key=lambda path: path.name):
                joined.write(path.read_bytes())
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(packages)
        wheel.unlink()
    return packages


def _import_path(packages: Path) -> str:
    """Return what Python would add to its path for a folder of installed packages, with what their .pth files add."""
    program = "import os, site, sys; old = [*sys.path]; site.addsitedir(sys.argv[1]); "
    program += "print(os.pathsep.join(path for path in sys.path if path not in old))"
    command = [sys.executable, "-c", program, str(packages)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def relocate(cache: Path, target: Path) -> None:
    """Write into each entry that its files lie under `target`: Triton lists absolute paths and ignores missing files."""
    for listing in cache.glob("*/__grp__*.json"):
        names = json.loads(listing.read_text())["child_paths"]
        paths = {name: str(target.resolve() / listing.parent.name / name) for name in names}
        listing.write_text(json.dumps({"child_paths": paths}))


def _listed(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":  # prints what a shell evaluates
    *sources, destination = (Path(argument) for argument in sys.argv[1:])
    for variable, value in unpack(sources, destination).items():
        print(f"export {variable}={value}")
