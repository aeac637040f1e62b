"""`python -m bench.gpu_prepare.launches`: compile what tests and benchmarks launch on a GPU, for Triton's cache.

Each command runs in a process with a pretended GPU, where results mean nothing: a test that fails there has compiled what it
launched until then. A provider of a benchmark that fails would leave kernels out, and is an error.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.__main__ import parser as bench_parser
from bench.case import Case
from bench.first_light import ITEMS
from bench.registry import benchmark
from bench.worker import Request, chosen

ROOT = Path(__file__).parents[2]
TESTS = (
    *("test_attention.py", "test_attention_operations.py", "test_decode.py", "test_linear_cross_entropy_kernels.py"),
    *("test_nearest.py", "test_norm.py", "test_repeats.py", "test_rope.py", "test_sampling.py", "test_swiglu.py"),
)
NO_DATA = "Cannot copy out of meta tensor"


def commands() -> Iterator[list[str]]:
    """Yield modules with their arguments: our providers of the benchmarks on a GPU, the sweep, then each file of tests."""
    for item in ITEMS:
        if item.command[:2] == ("-m", "bench"):
            yield ["bench.gpu_prepare.launches", "--ours", *item.command[2:]]
    yield ["bench.tune.candidates", "0", "1"]
    for test in TESTS:
        yield ["pytest", "-q", "--no-header", "--tb=no", "-m", "gpu", "-p", "no:cacheprovider", f"tests/kernels/{test}"]


def main() -> int:
    """Compile what is chosen, and return 1 where a command launched nothing or a provider failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_prepare.launches", description=__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="only commands in which it is found")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, help="run our providers of benchmarks, in this process")
    options = parser.parse_args()
    if options.ours:
        return 0 if run_ours(options.ours) else 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return max(pool.map(_run, [command for command in commands() if re.search(options.only, " ".join(command))]))


def _run(command: list[str]) -> int:
    pretended = [sys.executable, "-m", "bench.gpu_prepare.pretended", *command]
    done = subprocess.run(pretended, cwd=ROOT, capture_output=True, text=True, check=False)
    count = re.search(r"(\d+) kernels launched\n$", done.stdout)
    print(f"{count[1] if count else 'no':>4} kernels: {' '.join(command)}", flush=True)
    if done.stderr:
        print("    " + "\n    ".join(done.stderr.splitlines()[-5:]), flush=True)
    return 0 if count and int(count[1]) and (command[0] == "pytest" or not done.returncode) else 1


def run_ours(arguments: Sequence[str]) -> bool:
    """Run each provider of ours once in the cases that `python -m bench` would measure; return whether none failed."""
    options = bench_parser().parse_args(arguments)
    _one_layer_models()
    whole = True
    for name in options.names:
        if name == "training":
            _training_step()
            continue
        request = Request(benchmark(name).cases, pattern=options.case, providers=tuple(options.provider))
        for _, case in chosen(benchmark(name).load()(), request):
            for checked in (case, case.check):
                for title in checked.providers if checked else ():
                    if checked and title.startswith("ours"):
                        whole &= _run_once(checked, title)
    return whole


def _one_layer_models() -> None:
    """Leave all layers but one out of the models of later benchmarks: the others launch the same kernels."""
    from sbp_fast.config import files as config_files

    load = config_files.load_config
    config_files.load_config = lambda files, overrides=(): load(files, [*overrides, "model.layers=1"])


def _training_step() -> None:
    """Run the model of `bench.training` forward and backward, without its optimizer and process group, which need a GPU."""
    from bench import training
    from bench.length_distributions import documents
    from sbp_fast.model.transformer import Transformer

    config = training.load_config(["3b-200b"])
    model = Transformer(config.model, config.corpus.vocabulary_size).to("cuda", torch.bfloat16)
    tree = documents("lognormal, mean 821", training.TOKENS)
    batch = training.batches(tree, config.corpus.vocabulary_size)[0].to(torch.device("cuda"))
    model(batch.tokens, batch.layout, batch.targets, batch.loss_rows, "auto").backward()


def _run_once(case: Case, title: str) -> bool:
    try:
        case.providers[title](case.inputs(torch.Generator("cuda"))).run()
        return True
    except Exception as failure:  # noqa: BLE001 nothing that follows means anything on a pretended GPU
        if NO_DATA in str(failure):  # a generation reads the results of its first step, which has launched all its kernels
            return True
        print(f"{title} of {dict(case.shape)}: {type(failure).__name__}: {failure}", file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(main())
