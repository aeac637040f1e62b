"""`python -m bench.gpu_prepare`: collect what a GPU machine without a network needs into one folder.

The machine is meant to have Python 3.12, torch and triton 3.6.0, and what `bench.gpu_prepare.wheels` lists as present;
`--python` names an interpreter here with the same versions of Python and triton, and a torch of any build.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.gpu_prepare import archive, wheels
from bench.gpu_prepare.archive import LIMIT, VERSIONS, WHEELS

ROOT = Path(__file__).parents[2]
PRINT_VERSIONS = "import json; from bench.gpu_prepare.archive import versions; print(json.dumps(versions()))"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the folders, print what is in them, and return 1 where one is too large."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_prepare", description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="interpreter with the versions of the GPU machine")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-prepare", help="default: runs/gpu-prepare")
    parser.add_argument(
        "--flash-attn-4", nargs="*", metavar="NAME==VERSION", help="its packages, into two folders of their own"
    )
    parser.add_argument("--check", action="store_true", help="launch everything again on the unpacked cache: none may compile")
    parser.add_argument("--no-cache", action="store_true", help="wheels alone, no compiled kernels")
    options = parser.parse_args(arguments)
    folder = options.out
    versions = fresh(folder, options.python)
    packages = wheels.missing()
    wheels.collect(options.python, packages, folder / WHEELS)
    if not options.no_cache:
        print(f"compiling kernels for triton {versions['triton']}: several minutes", flush=True)
        try:
            compile_kernels(options.python, folder)
        except subprocess.CalledProcessError:
            print("what a command above launches was not compiled whole: nothing was packed", file=sys.stderr)
            return 1
    compiled_again = recompiled(options.python, folder) if options.check else set()
    folders = [folder]
    if options.flash_attn_4:
        folders += flash_attn_4(options.python, options.flash_attn_4, folder)
    status = report(folders)
    if options.check:
        print(f"launched again on the unpacked cache, {len(compiled_again)} kernels were compiled: {sorted(compiled_again)}")
    return 1 if compiled_again else status


def environment(packages: Path, cache: Path) -> dict[str, str]:
    """Return the variables with which an interpreter finds the project, packages unpacked elsewhere, and a compile cache."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(packages)]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return inherited | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}


def fresh(folder: Path, python: Path) -> dict[str, str]:
    """Empty a folder, and write what its content is for; return the versions of the interpreter."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / WHEELS).mkdir(parents=True)
    printed = subprocess.run([str(python), "-c", PRINT_VERSIONS], cwd=ROOT, capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(printed.stdout)
    (folder / VERSIONS).write_text(json.dumps(versions))
    return versions


def compile_kernels(python: Path, folder: Path, only: str = "") -> None:
    """Fill a compile cache with what tests and benchmarks launch, or some of them, and pack it into the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cache"
        _launch(python, archive.unpack_wheels([folder], Path(scratch) / "packages"), cache, only)
        archive.pack_cache(cache, folder)


def recompiled(python: Path, folder: Path, only: str = "") -> set[str]:
    """Unpack a folder, launch what filled its cache, and return the entries of the cache that are new or written anew."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "prepared"
        command = [str(python), "-m", "bench.gpu_prepare.archive", str(folder), str(target)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        packages, cache = target / "packages", target / "triton-cache"
        before = _written(cache)
        _launch(python, packages, cache, only)
        after = _written(cache)
    return {path.split("/")[0] for path in after if after[path] != before.get(path)}


def _launch(python: Path, packages: Path, cache: Path, only: str) -> None:
    command = [str(python), "-m", "bench.gpu_prepare.launches", "--only", only]
    subprocess.run(command, cwd=ROOT, env=environment(packages, cache), check=True)


def _written(cache: Path) -> dict[str, int]:
    """Times in nanoseconds at which the files of a cache were written, by relative path."""
    return {str(path.relative_to(cache)): path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}


def flash_attn_4(python: Path, packages: Sequence[str], beside: Path) -> list[Path]:
    """Collect FlashAttention-4 into two folders, its largest wheel in two parts, and return them."""
    folders = [beside.with_name(f"{beside.name}-flash-attn-4-{number}") for number in (1, 2)]
    for folder in folders:
        fresh(folder, python)
    first = folders[0] / WHEELS
    wheels.collect(python, packages, first)
    for wheel in list(first.iterdir()):
        if wheel.stat().st_size > LIMIT:
            archive.split_wheel(wheel, [folder / WHEELS for folder in folders])
    return folders


def report(folders: Sequence[Path]) -> int:
    """Print the files of the folders with their sizes, and how to use them; return 1 where one is larger than the limit."""
    status = 0
    for folder in folders:
        files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
        for path in files:
            print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.relative_to(folder)}")
        size = archive.size(folder)
        print(f"{size / 2**20:8.2f} MiB  {folder}, of at most {LIMIT >> 20}")
        if size > LIMIT:
            print(f"error: {folder} is too large", file=sys.stderr)
            status = 1
    for name, reason in wheels.LEFT_OUT.items():
        print(f"left out: {name}, {reason}")
    print(
        f"Copy {', '.join(map(str, folders))} to the same place on the GPU machine, where `make gpu` finds them, or there run\n"
        f'  eval "$(python -m bench.gpu_prepare.archive {" ".join(map(str, folders))} /tmp/prepared)"\n'
        "which unpacks them and sets PYTHONPATH and TRITON_CACHE_DIR."
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
