"""The machine of a benchmark: names and versions, and the measured rates of arithmetic and memory.

`python -m bench.machine` prints both as one line of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench import timing

RECORDED_PACKAGES = (
    "triton",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "xformers",
    "flash-attn",
    "quack-kernels",
    "hnswlib",
    "faiss-cpu",
    "scann-core",
    "megatron-core",
    "mosaicml-streaming",
    "litdata",
    "datasketch",
    "datatrove",
)


def tiny() -> bool:
    """Whether BENCH_TINY asks for shapes that are there to run every line, not to be timed."""
    return os.environ.get("BENCH_TINY") == "1"


def device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """Return the name of the GPU, or that of the processor with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else platform.processor()} {torch.get_num_threads()} threads"


def environment() -> dict[str, Any]:
    """Return what the figures depend on: device, driver, versions, threads and commit."""
    values: dict[str, Any] = {
        "device": device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "versions": {name: installed for name in RECORDED_PACKAGES if (installed := _version(name))},
    }
    if torch.cuda.is_available():
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        values |= {"cuda": torch.version.cuda, "driver": driver.splitlines()[:1]}
    else:
        values["capability"] = torch.backends.cpu.get_cpu_capability()
    return values


@cache
def roofline() -> dict[str, float]:
    """Measure on random data the FLOP/s of a large matrix product and the bytes/s of a large copy (read and written)."""
    cuda = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if cuda else (64 if tiny() else 1024, torch.float32)
    a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    source = torch.randn((1 << 29) if cuda else (1 << (10 if tiny() else 25)), device=device(), dtype=torch.float32)
    target = torch.empty_like(source)
    return {
        "flops": 2.0 * size**3 / _least_seconds(lambda: a @ b),
        "bytes": 2.0 * source.numel() * source.element_size() / _least_seconds(lambda: target.copy_(source)),
    }


def synchronize() -> None:
    """Wait until the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def settle(seconds: float = 0.3) -> None:
    """Keep the GPU busy until its clocks have settled."""
    if torch.cuda.is_available():
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            a @ a
            torch.cuda.synchronize()


def reset_peak_memory() -> int | None:
    """Begin to watch for the peak of memory; return the bytes allocated now, or None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory() -> int | None:
    """Return the most bytes allocated at once since `reset_peak_memory`, or None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def release_memory() -> None:
    """Free what no object holds any more, in Python and on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _least_seconds(call: Callable[[], Any], runs: int = 10) -> float:
    call()  # warm
    if torch.cuda.is_available():
        pace = timing.choose_pace(call)
        return min(timing.queued_seconds([call], pace)[0] for _ in range(runs))
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def _output(*command: str) -> str:
    """Return what a command prints, or "" where the machine does not have it."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps({"environment": environment(), "roofline": roofline()}))
