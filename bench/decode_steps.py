"""Steps of generation by kernel: a full batch of short documents, by our engine and by transformers' continuous batching.

A run reads the seeds and samples the same number of tokens in every row. Of ours one captured step is then replayed alone, at
the length that the documents have reached; transformers offers no step alone, so its kernels are those of a run, for each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench import machine
from bench.case import Case, Prepared, Provider, Schedule, Tensors, no_inputs
from bench.generation import (
    CONTINUOUS,
    PARTNER,
    EnginePool,
    Workload,
    flops_of_a_token,
    model_with_ends,
    precision,
    random_seeds,
    sampling_options,
    verify,
)
from bench.generation_transformers import continuous_batches
from sbp_fast.config.files import load_config
from sbp_fast.generate.engine import Seed
from sbp_fast.model.transformer import Transformer

NEVER = 1 << 40  # mean tokens of documents that none ends before the last step
KERNELS = 16  # that take the most time, each named in the results
REPLAYS = 20
SCHEDULE = Schedule(rounds=1, min_rounds=1, seconds=float("inf"), warm_up=1, alone=True)


def decode_steps() -> Iterator[Case]:
    """Eight samples a seed, then one; the 3B model on a GPU, and elsewhere a small one that shows that the benchmark works."""
    cuda = torch.cuda.is_available()
    config = load_config(["3b-200b" if cuda else "demo"])
    shape = config.model.model_copy(update={"context": 1024 if cuda else 64})
    rows, steps = (512, 64) if cuda else (16, 8)
    for samples in (8, 1):
        size = config.corpus.vocabulary_size
        yield _case(Workload("3B" if cuda else "demo", shape, size, rows // samples, samples, NEVER, steps, rows, 1))


def _case(workload: Workload) -> Case:
    model, seeds = model_with_ends(workload), random_seeds(workload)
    prompts = [np.append(seed.tokens, PARTNER) for seed in seeds]
    tokens = workload.rows * workload.longest
    batches = partial(continuous_batches, model, prompts, workload.samples, workload.rows, sampling_options(workload))

    def transformers(_: Tensors) -> Prepared:
        run = partial(batches(), len(seeds))
        return Prepared(run, work=float, statistics=lambda _: kernel_milliseconds(run, workload.longest))

    return Case(
        {
            "model": workload.name,
            "rows": workload.rows,
            "samples a seed": workload.samples,
            "steps": workload.longest,
            "precision": str(precision()).removeprefix("torch."),
        },
        no_inputs,
        {"ours": _ours(model, workload, seeds), CONTINUOUS: transformers},
        None,
        work=float(tokens),
        unit="tokens",
        flops=flops_of_a_token(workload) * tokens,
        verify=lambda: verify(model, prompts, EnginePool(model, workload).generate(seeds[:2])),
        clock=time.perf_counter,
        schedule=SCHEDULE,
    )


def _ours(model: Transformer, workload: Workload, seeds: list[Seed]) -> Provider:
    def provider(_: Tensors) -> Prepared:
        pool = EnginePool(model, workload)

        def run() -> int:
            return sum(result.generated_tokens for result in pool.generate(seeds))

        def statistics(_: float) -> dict[str, float]:
            (engine,) = pool.engines
            list(islice(engine.generate(seeds), 1))  # no document is taken from its row before the next step
            engine.decoder.running.zero_()  # so that each further step repeats this one
            step = partial(engine.decoder.step, engine.size)
            return {"ms of a step": _milliseconds(step), **kernel_milliseconds(step, 1)}

        return Prepared(run, work=float, statistics=statistics)

    return provider


def _milliseconds(step: Callable[[], Any]) -> float:
    """Mean of steps that are queued one behind the other."""
    machine.synchronize()
    started = time.perf_counter()
    for _ in range(REPLAYS):
        step()
    machine.synchronize()
    return (time.perf_counter() - started) / REPLAYS * 1e3


def kernel_milliseconds(run: Callable[[], Any], steps: int) -> dict[str, float]:
    """Return the milliseconds on the GPU of a run for each of its steps: those of the longest kernels, and all together."""
    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        machine.synchronize()
    spent = sorted(((event.self_device_time_total / 1e3 / steps, event.key) for event in trace.key_averages()), reverse=True)
    return {"ms of all kernels": sum(value for value, _ in spent)} | {
        f"ms of {name[:80]}": value for value, name in spent[:KERNELS]
    }
