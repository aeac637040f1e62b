"""What a benchmark ran on: names and versions, and the rates that its arithmetic and its memory reach."""

from __future__ import annotations

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

PEERS = (
    "triton",
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


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.processor()} {torch.get_num_threads()} threads"


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here, check=False)
    found: dict[str, Any] = {
        "device": device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip(),
        "versions": {name: installed for name in PEERS if (installed := _version(name))},
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False)
        found |= {"cuda": torch.version.cuda, "driver": driver.stdout.strip().splitlines()[:1]}
    else:
        found["capability"] = torch.backends.cpu.get_cpu_capability()
    return found


@cache
def limits() -> dict[str, float]:
    """Measured, on random data: FLOP/s of a large matrix product, bytes/s of a large copy (read and written)."""
    cuda = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    source = torch.randn((1 << 29) if cuda else (1 << 25), device=device(), dtype=torch.float32)
    target = torch.empty_like(source)
    return {
        "flops": 2.0 * size**3 / _best(lambda: a @ b),
        "bytes": 2.0 * source.numel() * source.element_size() / _best(lambda: target.copy_(source)),
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def settle(seconds: float = 1.0) -> None:
    """Keep the device busy until its clocks are what they will be."""
    if torch.cuda.is_available():
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            a @ a
            torch.cuda.synchronize()


def _best(call: Callable[[], Any], runs: int = 10) -> float:
    times = []
    for _ in range(runs):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
