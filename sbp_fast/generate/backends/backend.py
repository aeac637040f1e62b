"""The interface of generation backends, their registry, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from sbp_fast.config import RunConfig, SynthesizeConfig, resolve_threads
from sbp_fast.config.synthesize import NO_SEEDS
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.tokenizer import TOKENIZER
from sbp_fast.generate.decoder import SamplingParams
from sbp_fast.generate.engine import GenerationResult, Seed
from sbp_fast.model.huggingface import export_model
from sbp_fast.pipeline.distributed import Processes
from sbp_fast.registry import Registry


class DocumentGenerator(Protocol):
    """Generates documents after seeds. A process may have several, each in a thread of its own."""

    def generate(self, seeds: Iterable[Seed]) -> Iterator[GenerationResult]:
        """Yield a result for every sample of every seed, in any order."""
        ...


@dataclass(frozen=True)
class LoadedBackend:
    """The generators of a process.

    Attributes:
        threads: CPU threads that each generator may use for its operations.
        settings: what "auto" resolved to, for the console.
        versions: name -> version of the package that generates, if it is not this one.
    """

    generators: list[DocumentGenerator]
    threads: int
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)


def _accept(settings: SynthesizeConfig, device: torch.device) -> None:
    """Refuse nothing."""


@dataclass(frozen=True)
class Backend:
    """A way of generating documents.

    Attributes:
        load: (configuration, synthesizer, corpus, scratch directory that the first process may make, processes) -> the
            generators of this process; all processes call it together. Raises UserError where the backend cannot run.
        check: (settings, device); raises UserError naming a setting that the backend does not have, before anything is written.
        reproducible_on_cpu: whether documents on a CPU depend on nothing but settings, synthesizer and corpus.
    """

    load: Callable[[RunConfig, Path, PreparedCorpus, Path, Processes], LoadedBackend]
    check: Callable[[SynthesizeConfig, torch.device], object] = _accept
    reproducible_on_cpu: bool = False


BACKENDS = Registry[Backend]("generation backend")
"""What `synthesize.backend` may name."""


def export_synthesizer(model: Path, prepared: PreparedCorpus, scratch: Path, processes: Processes) -> Path:
    """Export the synthesizer to `scratch` as a Hugging Face directory; all processes call this together."""
    exported = scratch / "model"
    if processes.is_rank0:
        scratch.mkdir(parents=True, exist_ok=True)
        export_model(model, prepared.directory / TOKENIZER, exported)
    processes.gather(None)
    return exported


def model_precision(settings: SynthesizeConfig, device: torch.device) -> str:
    """Return the name of the torch dtype that the model computes in."""
    if settings.precision != "auto":
        return settings.precision
    return "bfloat16" if device.type == "cuda" else "float32"


def threads_per_process(config: RunConfig, processes: int) -> int:
    """Return the CPU threads of each of `processes` processes."""
    return max(1, resolve_threads(config) // processes)


def sampling_params(settings: SynthesizeConfig, prepared: PreparedCorpus, context: int) -> SamplingParams:
    """Return the parameters of documents that hold no special token but their end.

    A document after a seed follows the partner token, as the synthesizer was tuned; one after no seed the token that begins any
    document, as the model was pretrained.
    """
    tokenizer = prepared.tokenizer
    return SamplingParams(
        first=tokenizer.begin if settings.seeds == NO_SEEDS else tokenizer.partner,
        end=tokenizer.end,
        forbidden=(tokenizer.begin, tokenizer.partner),
        maximum_tokens=min(settings.maximum_tokens or context, context),
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        repeated_tokens=settings.repeated_tokens,
    )
