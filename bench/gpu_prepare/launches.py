"""`python -m bench.gpu_prepare.launches`: compile what tests and benchmarks launch on a GPU, for Triton's cache.

Each command runs in a process with a pretended GPU, where results mean nothing: a test that fails there has compiled what it
launched until then.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = (
    "test_attention.py test_attention_operations.py test_decode.py test_linear_cross_entropy_kernels.py test_nearest.py "
    "test_norm.py test_repeats.py test_rope.py test_sampling.py test_swiglu.py"
).split()


def commands() -> Iterator[list[str]]:
    """Yield modules with their arguments: our providers of the benchmarks on a GPU first, then each file of tests."""
    from bench.first_light import ITEMS

    for item in ITEMS:
        if item.command[:2] == ("-m", "bench"):
            yield [__spec__.name, *item.command[2:]]
    for test in TESTS:
        yield ["pytest", "-q", "--no-header", "--tb=no", "-m", "gpu", "-p", "no:cacheprovider", f"tests/kernels/{test}"]


def main() -> int:
    """Compile everything, or what the arguments name, and return 1 where a command launched nothing."""
    if len(sys.argv) > 1:
        run_ours(sys.argv[1], sys.argv[2:])
        return 0
    with ThreadPoolExecutor() as pool:
        return max(pool.map(_run, commands()))


def _run(command: list[str]) -> int:
    pretended = [sys.executable, "-m", "bench.gpu_prepare.pretended", *command]
    done = subprocess.run(pretended, cwd=ROOT, capture_output=True, text=True, check=False)
    said = done.stdout.splitlines()[-1:] or ["0 kernels launched"]
    print(f"{' '.join(command)[:100]}: {said[0]}", *done.stderr.splitlines()[-5:], sep="\n    ", flush=True)
    return int(not said[0].endswith("kernels launched") or said[0].startswith("0 "))


def run_ours(name: str, options: list[str]) -> None:
    """Run each provider of ours once in the cases of a benchmark that the options choose."""
    import torch

    from bench.registry import benchmark
    from bench.worker import Request, chosen

    values = list(pairwise(options))
    patterns = [value for option, value in values if option == "--case"]
    request = Request(benchmark(name).cases, pattern=patterns[0] if patterns else "")
    for _, case in chosen(benchmark(name).load()(), request):
        for shape in (case, case.check):
            for provider in shape.providers if shape else ():
                if provider.startswith("ours"):
                    try:
                        shape.providers[provider](shape.inputs(torch.Generator("cuda"))).run()
                    except Exception as failure:
                        print(f"{case.shape} {provider}: {type(failure).__name__}: {failure}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
