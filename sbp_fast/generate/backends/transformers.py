"""The backend `transformers`: Hugging Face's `generate` in this process (see `transformers_generator`)."""

from __future__ import annotations

from pathlib import Path

import torch

from sbp_fast.config import RunConfig, SynthesizeConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.generate.backends.backend import (
    BACKENDS,
    Backend,
    LoadedBackend,
    export_synthesizer,
    model_precision,
    sampling_params,
    threads_per_process,
)
from sbp_fast.model.saved import read_description
from sbp_fast.pipeline.distributed import Processes

BATCH_DOCUMENTS = 32


def check_transformers(settings: SynthesizeConfig, device: torch.device) -> None:
    """Refuse the settings of a cache, which `generate` does not have.

    Raises:
        UserError: naming them.
    """
    if settings.cache_precision != "auto" or settings.cache_gib:
        problem = 'go with the backends "engine" and "vllm", not with "transformers"'
        raise UserError("synthesize.cache_precision and cache_gib", problem, "leave them out, or choose another backend")


def load_transformers(
    config: RunConfig, model: Path, prepared: PreparedCorpus, scratch: Path, processes: Processes
) -> LoadedBackend:
    """Load the exported synthesizer, once in this process."""
    from transformers import __version__ as version

    from sbp_fast.generate.backends.transformers_generator import TransformersGenerator, load_exported  # takes seconds

    settings, device = config.synthesize, processes.device
    exported = export_synthesizer(model, prepared, scratch, processes)
    sampling = sampling_params(settings, prepared, read_description(model)[0].context)
    precision = model_precision(settings, device)
    rows = BATCH_DOCUMENTS if settings.batch_documents == "auto" else settings.batch_documents
    generator = TransformersGenerator(load_exported(exported, precision, device), sampling, rows, config.seed)
    resolved = {"precision": precision, "batch_documents": rows, "transformers": version}
    return LoadedBackend([generator], threads_per_process(config, processes.world), resolved, {"transformers": version})


BACKENDS.register("transformers", Backend(load_transformers, check_transformers))
