"""How documents are generated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sbp_fast.config.section import NO_EFFECT, Count, Section


class SynthesizeConfig(Section):
    oversample: Annotated[float, Field(ge=1)] = 1.25
    """Tokens asked for, over those the joint run can use; the rest is room for the filters."""
    seeds: Literal["uniform", "length"] = "uniform"
    """How seeds are chosen: every document equally often, or in proportion to its length."""
    samples_per_seed: Count = 2
    """Documents drawn after each seed, which is read once for all of them."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 takes the most probable token always."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from so many most probable tokens alone (0: all)."""
    maximum_tokens: Annotated[int, Field(ge=0)] = 0
    """Cut a document off after so many (0: the model's context)."""
    repeated_tokens: Annotated[int, Field(ge=0)] = 13
    """Stop a document whose last so many tokens have occurred in it before, as the filter would reject it (0: never)."""
    backend: Literal["engine", "transformers", "vllm"] = "engine"
    """What draws: our engine; transformers' `generate`, as a check; vLLM, in an environment of its own."""
    vllm_python: Annotated[str, NO_EFFECT] = ""
    """The Python of the environment that has vLLM."""
    batch_documents: Annotated[Count | Literal["auto"], NO_EFFECT] = "auto"
    """Documents drawn together by each process, or each thread of a CPU; "auto" takes 128 on a CPU, 512 on a GPU, 32 with
    transformers, and leaves it to vLLM."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; "auto" is bfloat16 on CUDA, float32 elsewhere."""
    cache_precision: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    """What keys and values are kept in; "auto" is the model's precision."""
    cache_gib: Annotated[float, Field(ge=0), NO_EFFECT] = 0.0
    """Memory for keys and values (0: what all documents at their longest take, or most of what is free)."""
    shard_seeds: Count = 128
    """Seeds whose documents make a shard."""
