"""What draws documents: our engine, transformers or vLLM, each behind one method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from sbp_fast.config import RunConfig, SynthesizeConfig, resolve_threads
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.generate.decoder import ROW_MULTIPLE, Room, SamplingRule
from sbp_fast.generate.engine import Draft, Engine, Seed
from sbp_fast.model.huggingface import export_model
from sbp_fast.model.saved import load_model, read_description
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.distributed import Processes

PAGE_TOKENS = 64
PREFILL_TOKENS = 8192
GPU_SHARE = 0.85  # of the memory that is free once the weights are there
CPU_GIB = 4.0


class Drawer(Protocol):
    """Draws documents after seeds. A process may have several, each in a thread of its own."""

    def draw(self, seeds: Iterable[Seed]) -> Iterator[Draft]:
        """Every sample of every seed, in any order."""
        ...


@dataclass(frozen=True)
class Drawers:
    """What a process draws with.

    Attributes:
        threads: that each may use for its operations.
        facts: what "auto" became, for the record.
        versions: of the package that draws, if it is not this one.
    """

    members: list[Drawer]
    threads: int
    facts: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)


def check_backend(config: RunConfig, device: torch.device) -> None:
    """Refuse what the backend cannot do, before anything is written.

    Raises:
        UserError: naming the setting; no Python that has vLLM.
    """
    settings = config.synthesize
    if settings.backend == "transformers":
        if settings.cache_precision != "auto" or settings.cache_gib:
            what = 'go with the backends "engine" and "vllm", not with "transformers"'
            raise UserError("synthesize.cache_precision and cache_gib", what, "leave them out, or choose another backend")
    elif settings.backend == "vllm":
        from sbp_fast.generate.backends.vllm import check_vllm

        check_vllm(settings, device)


def open_backend(config: RunConfig, model: Path, prepared: PreparedCorpus, scratch: Path, processes: Processes) -> Drawers:
    """What `synthesize.backend` names; all processes call this together.

    Args:
        scratch: a directory for files of the backend, which the first process may make.

    Raises:
        UserError: the backend cannot run here, or not with this model.
    """
    settings, device = config.synthesize, processes.device
    if settings.backend == "engine":
        return open_engine(config, model, prepared, device, processes.world)
    exported = scratch / "model"
    if processes.is_rank0:
        scratch.mkdir(parents=True, exist_ok=True)
        export_model(model, prepared.directory / "tokenizer.json", exported)
    processes.gather(None)
    context = read_description(model)[0].context
    rule, threads = sampling_rule(settings, prepared, context), threads_of(config, processes.world)
    if settings.backend == "transformers":
        from sbp_fast.generate.backends.transformers import open_transformers  # takes seconds

        return open_transformers(config, exported, rule, device, threads)
    from sbp_fast.generate.backends.vllm import open_vllm

    return open_vllm(config, exported, rule, context, scratch / f"vllm-{processes.rank:05d}", device)


def open_engine(config: RunConfig, model: Path, prepared: PreparedCorpus, device: torch.device, processes: int) -> Drawers:
    """Our engine, once on a GPU, or once for each thread of a CPU.

    On a CPU a step has many small operations, and threads that share these wait for each other most of the time (docs/log.md).
    """
    settings = config.synthesize
    precision = model_precision(settings, device)
    synthesizer = load_model(model, device).to(getattr(torch, precision))
    rule = sampling_rule(settings, prepared, synthesizer.config.context)
    threads = threads_of(config, processes)
    engines = threads if device.type == "cpu" else 1
    room = room_for(settings, synthesizer, rule, precision, engines)
    facts = {
        "precision": precision,
        "cache_precision": room.precision,
        "batch_documents": room.rows,
        "engines": engines,
        "pages": room.pages,
        "page_tokens": room.page_tokens,
    }
    return Drawers([Engine(synthesizer, rule, room, config.seed) for _ in range(engines)], threads // engines, facts)


def model_precision(settings: SynthesizeConfig, device: torch.device) -> str:
    """Name of the torch dtype that the model computes in."""
    if settings.precision != "auto":
        return settings.precision
    return "bfloat16" if device.type == "cuda" else "float32"


def threads_of(config: RunConfig, processes: int) -> int:
    """CPU threads of each process."""
    return max(1, resolve_threads(config) // processes)


def sampling_rule(settings: SynthesizeConfig, prepared: PreparedCorpus, context: int) -> SamplingRule:
    """A document follows the partner token and has no special token but its end."""
    tokenizer = prepared.tokenizer
    return SamplingRule(
        first=tokenizer.partner,
        end=tokenizer.end,
        forbidden=(tokenizer.begin, tokenizer.partner),
        maximum_tokens=min(settings.maximum_tokens or context, context),
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        repeated_tokens=settings.repeated_tokens,
    )


def room_for(settings: SynthesizeConfig, model: Transformer, rule: SamplingRule, precision: str, engines: int) -> Room:
    """Rows and pages of each engine: what all rows take at their longest, within the memory there is."""
    device, shape = model.device.type, model.config
    wanted = {"cpu": 128, "cuda": 512}[device] if settings.batch_documents == "auto" else settings.batch_documents
    rows = -(-wanted // ROW_MULTIPLE) * ROW_MULTIPLE
    cache = {"auto": precision, "float8": "float8_e4m3fn"}.get(settings.cache_precision, settings.cache_precision)
    room = Room(
        rows=rows,
        group=settings.samples_per_seed,
        pages=0,
        page_tokens=PAGE_TOKENS,
        seed_tokens=shape.context,
        prefill_tokens=max(PREFILL_TOKENS, shape.context),
        precision=cache,
    )
    own, seed = room.pages_of(rule.maximum_tokens), room.pages_of(shape.context)
    groups = -(-rows // settings.samples_per_seed) + room.prefill_tokens // shape.context
    most = 1 + rows * own + groups * seed
    numbers = 2 * shape.layers * shape.kv_heads * shape.head_dim * room.page_tokens
    page_bytes = numbers * getattr(torch, cache).itemsize
    least = 1 + seed + own
    memory = settings.cache_gib * 2**30 or free_bytes(model.device)
    fitting = int(memory / engines // page_bytes)
    if fitting < least:
        needed = f"{least * page_bytes * engines / 2**30:.3g} GiB"
        found = f"{memory / 2**30:.3g} GiB of keys and values do not hold one seed and one document, which take {needed}"
        raise UserError("synthesize.cache_gib", found, "give it more, or lower synthesize.maximum_tokens")
    return Room(**{**vars(room), "pages": min(most, fitting)})


def free_bytes(device: torch.device) -> float:
    """Memory that keys and values may take by default."""
    if device.type == "cuda":
        return GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    return CPU_GIB * 2**30
