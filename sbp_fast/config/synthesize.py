"""How documents are generated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sbp_fast.config.section import NO_EFFECT, Count, CountOrZero, Section

NO_SEEDS = "none"


class SynthesizeConfig(Section):
    """How many documents are generated, after which seeds, and how their tokens are sampled."""

    oversample: Annotated[float, Field(ge=1, le=1000)] = 1.25
    """Tokens generated for each synthetic token that an arm can read; the filters may reject the surplus."""
    seeds: str = "uniform"
    """A registered seed sampler: `uniform` chooses every document equally often, `length` in proportion to its tokens; `none`
    generates documents after no seed."""
    samples_per_seed: Count = 2
    """Documents generated after each seed, which is prefilled once for all of them."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """0 takes the most probable token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    top_k: CountOrZero = 0
    """Sample only from this many most probable tokens (0: all)."""
    maximum_tokens: CountOrZero = 0
    """Truncate a document after this many tokens (0: the model's context)."""
    repeated_tokens: CountOrZero = 13
    """Stop a document when its last tokens, this many, have occurred in it before, as the filter would reject it (0: never)."""
    backend: str = "engine"
    """A registered generation backend: `engine`, the built-in one; `transformers`, whose `generate` checks the engine; `vllm`,
    in an environment of its own."""
    vllm_python: Annotated[str, NO_EFFECT] = ""
    """The Python of the environment that has vLLM."""
    batch_documents: Annotated[Count | Literal["auto"], NO_EFFECT] = "auto"
    """Documents generated together by each process, or each thread of a CPU; "auto" takes 128 on a CPU, 512 on a GPU, 32 with
    transformers, and leaves it to vLLM."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model; "auto" is bfloat16 on CUDA, float32 elsewhere."""
    cache_precision: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    """Precision of the cache of keys and values; "auto" is the model's precision."""
    cache_gib: Annotated[float, Field(ge=0, le=1e6), NO_EFFECT] = 0.0
    """Memory for keys and values (0: enough for all documents at their longest, or most of the free memory)."""
    shard_seeds: Count = 128
    """Seeds whose documents form a shard."""
