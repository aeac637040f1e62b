"""The backend `engine`: the built-in engine, and the size of its batch and cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from sbp_fast.config import RunConfig, SynthesizeConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.generate.backends.backend import (
    BACKENDS,
    Backend,
    LoadedBackend,
    model_precision,
    sampling_params,
    threads_per_process,
)
from sbp_fast.generate.decoder import PAGE_TOKENS, PREFILL_TOKENS, ROW_MULTIPLE, KVCacheConfig, SamplingParams
from sbp_fast.generate.engine import Engine
from sbp_fast.model.saved import load_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.distributed import Processes

GPU_SHARE = 0.85
"""Share of the memory that is free beside the weights."""
CPU_GIB = 4.0
BATCH_DOCUMENTS = {"cpu": 128, "cuda": 512}


def load_engine(config: RunConfig, model: Path, prepared: PreparedCorpus, scratch: Path, processes: Processes) -> LoadedBackend:
    """Load the built-in engine, once on a GPU, or once for each thread of a CPU.

    On a CPU a step has many small operations; threads that share them wait for each other most of the time (docs/log.md).

    Raises:
        UserError: the cache does not hold one seed and one document.
    """
    settings, device = config.synthesize, processes.device
    precision = model_precision(settings, device)
    synthesizer = load_model(model, device).to(getattr(torch, precision))
    sampling = sampling_params(settings, prepared, synthesizer.config.context)
    threads = threads_per_process(config, processes.world)
    engines = threads if device.type == "cpu" else 1
    cache = cache_config(settings, synthesizer, sampling, precision, engines)
    resolved = {
        "precision": precision,
        "cache_precision": cache.precision,
        "batch_documents": cache.rows,
        "engines": engines,
        "pages": cache.pages,
        "page_tokens": cache.page_tokens,
    }
    members = [Engine(synthesizer, sampling, cache, config.seed) for _ in range(engines)]
    return LoadedBackend([*members], threads // engines, resolved)


def cache_config(
    settings: SynthesizeConfig, model: Transformer, sampling: SamplingParams, precision: str, engines: int
) -> KVCacheConfig:
    """Return rows and pages of each engine: enough for all rows at their longest, within the available memory.

    Raises:
        UserError: the memory does not hold one seed and one document.
    """
    device, shape = model.device.type, model.config
    wanted = BATCH_DOCUMENTS[device] if settings.batch_documents == "auto" else settings.batch_documents
    dtype = {"auto": precision, "float8": "float8_e4m3fn"}.get(settings.cache_precision, settings.cache_precision)
    cache = KVCacheConfig(
        rows=-(-wanted // ROW_MULTIPLE) * ROW_MULTIPLE,
        samples_per_seed=settings.samples_per_seed,
        pages=0,
        page_tokens=PAGE_TOKENS,
        seed_tokens=shape.context,
        prefill_tokens=max(PREFILL_TOKENS, shape.context),
        precision=dtype,
    )
    document_pages, seed_pages = cache.pages_of(sampling.maximum_tokens), cache.pages_of(shape.context)
    groups = -(-cache.rows // settings.samples_per_seed) + cache.prefill_tokens // shape.context
    most = 1 + cache.rows * document_pages + groups * seed_pages
    least = 1 + seed_pages + document_pages
    numbers = 2 * shape.layers * shape.kv_heads * shape.head_dim * cache.page_tokens
    page_bytes = numbers * getattr(torch, dtype).itemsize
    memory = settings.cache_gib * 2**30 or available_bytes(model.device)
    fitting = int(memory / engines // page_bytes)
    if fitting < least:
        needed = f"{least * page_bytes * engines / 2**30:.3g} GiB"
        problem = f"{memory / 2**30:.3g} GiB of keys and values do not hold one seed and one document, which take {needed}"
        raise UserError("synthesize.cache_gib", problem, "give it more, or lower synthesize.maximum_tokens")
    return replace(cache, pages=min(most, fitting))


def available_bytes(device: torch.device) -> float:
    """Return the memory that keys and values may take by default."""
    if device.type == "cuda":
        return GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    return CPU_GIB * 2**30


BACKENDS.register("engine", Backend(load_engine, reproducible_on_cpu=True))
