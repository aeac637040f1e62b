"""Documents sampled from seeds: our engine beside transformers on the same weights, in seconds a token.

Weights are random, and a document ends with the same probability at every token, so that lengths are as uneven as real ones.
Every provider samples its own documents from the same seeds; the time of reading the seeds counts. The roofline is that of
reading memory, or of arithmetic where that is slower. Without a GPU the models are those of `small` and `mini`, and
every provider has all cores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from sbp_kernels import PackedLayout

from bench import machine
from bench.case import Case, Prepared, Provider, Schedule, Tensors, no_inputs
from bench.generation_transformers import continuous_batches, log_probability_error, padded_batches
from sbp_fast.config import ModelConfig
from sbp_fast.config.files import load_config
from sbp_fast.experiment.costs import key_value_bytes
from sbp_fast.generate.decoder import KVCacheConfig, SamplingParams
from sbp_fast.generate.engine import Engine, GenerationResult, Seed
from sbp_fast.model.flops import matrix_parameters
from sbp_fast.model.transformer import Block, Transformer

BEGIN, END, PARTNER = 0, 1, 2
TOP_P = 0.9
CONSTANT = 8.0  # of the hidden state's first channel, beside its other channels
CONTINUOUS = "transformers, generate_batch"
SEED_SHARES = {} if torch.cuda.is_available() else {CONTINUOUS: 1 / 4}  # part of the seeds for a provider that takes minutes
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the log-probability of checked documents, relative
SCHEDULE = Schedule(
    rounds=2, min_rounds=1, seconds=float("inf"), warm_up=0, alone=True, once=tuple(SEED_SHARES)
)  # a run takes minutes


@dataclass(frozen=True)
class Workload:
    """Documents to generate.

    Attributes:
        name: of the model.
        shape: of the model.
        vocabulary_size: of the model.
        seeds: how many.
        samples: documents of each seed.
        mean_tokens: of a document, before the longest are cut at `longest`.
        longest: tokens of a document at most.
        rows: documents at once, in each of `engines`.
        engines: of ours, one a thread.
    """

    name: str
    shape: ModelConfig
    vocabulary_size: int
    seeds: int
    samples: int
    mean_tokens: int
    longest: int
    rows: int
    engines: int


def generation() -> Iterator[Case]:
    """Every model and number of samples a seed; a model is built when its case is reached."""
    for workload in workloads():
        yield _case(workload)


def workloads() -> Iterator[Workload]:
    """Yield the workloads, the most important first."""
    cuda = torch.cuda.is_available()
    for samples in (8, 1, 4) if cuda else (8, 2, 1):
        if cuda:
            config = load_config(["3b-200b"])
            shape = config.model.model_copy(update={"context": 1024})
            yield Workload("3B", shape, config.corpus.vocabulary_size, 2048 // samples, samples, 512, 2048, 512, 1)
            continue
        threads = torch.get_num_threads()
        for name, documents, rows in (("small", 192, 32), ("mini", 64, 16)):
            config = load_config([name])
            shape, size = config.model, config.corpus.vocabulary_size
            mean = shape.context // 4
            yield Workload(name, shape, size, documents // samples, samples, mean, shape.context, rows, threads)


def _case(workload: Workload) -> Case:
    model, seeds = model_with_ends(workload), random_seeds(workload)
    results = EnginePool(model, workload).generate(seeds)
    prompts = [np.append(seed.tokens, PARTNER) for seed in seeds]
    rows = workload.rows * workload.engines

    def ours() -> Callable[[int], int]:
        pool = EnginePool(model, workload)
        return lambda count: sum(result.generated_tokens for result in pool.generate(seeds[:count]))

    batches = partial(padded_batches, model, prompts, workload.samples, rows, sampling_options(workload))
    makers: dict[str, Callable[[], Callable[[int], int]]] = {
        "ours": ours,
        "transformers, generate": partial(batches, {}),
        "transformers, generate, static cache": partial(batches, {"cache_implementation": "static", "disable_compile": True}),
        CONTINUOUS: partial(continuous_batches, model, prompts, workload.samples, rows, sampling_options(workload)),
    }
    return Case(
        {
            "model": workload.name,
            "seeds": workload.seeds,
            "samples a seed": workload.samples,
            "rows": rows,
            "mean tokens": workload.mean_tokens,
            "at most": workload.longest,
            "precision": str(precision()).removeprefix("torch."),
        },
        no_inputs,
        {name: _provider(make, int(len(seeds) * SEED_SHARES.get(name, 1))) for name, make in makers.items()},
        None,
        work=1.0,
        unit="tokens",
        flops=flops_of_a_token(workload),
        bytes=bytes_of_a_token(workload, seeds, results),
        verify=lambda: verify(model, prompts, results),
        statistics={"mean tokens of a document": statistics.mean(result.generated_tokens for result in results)},
        clock=time.perf_counter,
        schedule=SCHEDULE,
    )


def _provider(make: Callable[[], Callable[[int], int]], seeds: int) -> Provider:
    """A provider from a function that builds it; what it builds takes a number of seeds and returns the tokens sampled."""

    def provider(_: Tensors) -> Prepared:
        return Prepared(partial(make(), seeds), work=float)

    return provider


def precision() -> torch.dtype:
    """Return the dtype of the weights: bfloat16 on a GPU, else float32."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def model_with_ends(workload: Workload) -> Transformer:
    """Return a model of random weights that ends a document with probability 1 / mean_tokens at every token.

    The first channel of the hidden state is the same for every token and layer, and only the end token's row of the output
    projection reads it.
    """
    shape = workload.shape.model_copy(update={"tied_embeddings": False})
    with torch.device("meta"):
        model = Transformer(shape, workload.vocabulary_size)
    model = model.to_empty(device=machine.device()).eval()
    model.initialize(0)
    assert model.lm_head is not None
    with torch.no_grad():
        model.embed_tokens.weight[:, 0] = CONSTANT * 0.02
        for block in cast(list[Block], list(model.layers)):
            block.self_attn.o_proj.weight[0] = 0
            block.mlp.down_proj.weight[0] = 0
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[END] = 0
        tokens = torch.from_numpy(np.random.default_rng(0).integers(3, workload.vocabulary_size, 256)).to(model.device)
        hidden = model(tokens, PackedLayout.from_lengths([256]).to(model.device))
        others = model.logits(hidden)[:, 3:].logsumexp(-1).mean()
        model.lm_head.weight[END, 0] = (others - np.log(workload.mean_tokens - 1)) / hidden[:, 0].mean()
    return model.to(precision())


def random_seeds(workload: Workload) -> list[Seed]:
    """Return seeds of lognormal lengths with a mean of half a context."""
    random, context = np.random.default_rng(1), workload.shape.context
    lengths = random.lognormal(np.log(context / 2) - 0.125, 0.5, workload.seeds).clip(16, context).astype(int)
    samples = tuple(range(workload.samples))
    return [Seed(i, i, random.integers(3, workload.vocabulary_size, n), samples) for i, n in enumerate(lengths)]


class EnginePool:
    """Our engine, once for each thread of a CPU."""

    def __init__(self, model: Transformer, workload: Workload) -> None:
        rows, samples, context = workload.rows, workload.samples, workload.shape.context
        sampling = SamplingParams(PARTNER, END, (BEGIN, PARTNER), workload.longest, 1.0, TOP_P, repeated_tokens=0)
        cache = KVCacheConfig(rows, samples, 0, 64, context, max(8192, context), str(precision()).removeprefix("torch."))
        pages = 1 + rows * cache.pages_of(workload.longest) + (rows // samples + 8) * cache.pages_of(context)
        if model.device.type == "cuda":
            page = key_value_bytes(workload.shape) * cache.page_tokens
            pages = min(pages, int(0.8 * torch.cuda.mem_get_info()[0] / page))
        self.engines = [Engine(model, sampling, replace(cache, pages=pages), 0) for _ in range(workload.engines)]

    def generate(self, seeds: list[Seed]) -> list[GenerationResult]:
        """Return the documents of all seeds, which the engines share out."""
        shares = [seeds[index :: len(self.engines)] for index in range(len(self.engines))]
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(len(shares), initializer=torch.set_num_threads, initargs=(threads // len(shares),)) as pool:
            results = [
                result
                for share in pool.map(lambda i: list(self.engines[i].generate(shares[i])), range(len(shares)))
                for result in share
            ]
        torch.set_num_threads(threads)
        return results


def sampling_options(workload: Workload) -> dict[str, Any]:
    """Options of transformers that sample as ours does."""
    return {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": TOP_P,
        "top_k": 0,
        "max_new_tokens": workload.longest,
        "eos_token_id": END,
        "pad_token_id": END,
        "suppress_tokens": [BEGIN, PARTNER],
    }


def verify(model: Transformer, prompts: list[np.ndarray], results: list[GenerationResult]) -> dict[str, Any]:
    """Check the log-probabilities that our engine reports for some documents against transformers."""
    checked = [(prompts[result.seed], [*result.tokens.tolist(), *[END] * (result.stop == "end")]) for result in results[:16]]
    error = log_probability_error(model, checked, sum(result.log_probability for result in results[:16]))
    return {"right": error <= AGREEMENT[precision()], "errors": {"log-probability": error}}


def flops_of_a_token(workload: Workload) -> float:
    """Return the arithmetic of one sampled token, without attention and the reading of seeds."""
    return 2.0 * (matrix_parameters(workload.shape) + workload.vocabulary_size * workload.shape.hidden_size)


def bytes_of_a_token(workload: Workload, seeds: list[Seed], results: list[GenerationResult]) -> float:
    """Return the fewest bytes read for one sampled token.

    They are its share of the weights, which are read once for all rows, its share of its seed, which is read once for all
    samples, and on average half of its document.
    """
    size = precision().itemsize
    lengths = np.array([result.generated_tokens for result in results], np.float64)
    seed = sum(len(seeds[result.seed].tokens) * result.generated_tokens for result in results) / lengths.sum()
    own = (lengths**2).sum() / lengths.sum() / 2
    weights = size * (matrix_parameters(workload.shape) + workload.vocabulary_size * workload.shape.hidden_size)
    return float(weights / workload.rows + key_value_bytes(workload.shape) * size / 2 * (seed / workload.samples + own))
