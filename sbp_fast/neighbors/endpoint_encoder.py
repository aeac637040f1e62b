"""Embedding models behind OpenAI-compatible servers, such as TEI and vLLM are: texts to unit vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sbp_fast.config import EmbedConfig
from sbp_fast.data.input_files import shorten
from sbp_fast.errors import UserError
from sbp_fast.neighbors.vectors import check_lengths
from sbp_fast.pipeline.openai_client import OpenAiClient, ServerSettings

BATCH = 32  # texts of a request; TEI refuses more unless it is told to take them
PROBE = "text"
REMEDY = "leave the document out, or embed with another embed.model"


def check_endpoint(config: EmbedConfig) -> None:
    """Refuse unusable settings of a server, without sending a request.

    Raises:
        UserError: the URL is none or has secrets in it, or the key is not set.
    """
    if config.endpoint:
        _server(config).check()


def _server(config: EmbedConfig) -> ServerSettings:
    return ServerSettings(
        url=config.endpoint,
        key_variable=config.endpoint_key_variable,
        requests=config.endpoint_requests,
        timeout_seconds=config.endpoint_timeout_seconds,
        url_name="embed.endpoint",
        key_name="embed.endpoint_key_variable",
        remedy="correct embed.endpoint, embed.model or the key, or lower embed.endpoint_characters",
    )


class EndpointEncoder:
    """An embedding model behind `POST URL/embeddings` (see `OpenAiClient`).

    Attributes:
        dimension: components of a vector; the first `embed.dimensions` of the model's, brought to unit length again.
        batch_documents: texts of a request.
        limit: characters of a text that are sent.
        counts, description: see `TextEncoder`.

    Raises:
        UserError: unusable settings, a server that refuses, or vectors shorter than `embed.dimensions`.
        TransientError: a server that does not answer, or not with vectors.
    """

    def __init__(self, config: EmbedConfig) -> None:
        check_endpoint(config)
        self._config, self._server_dimension = config, 0
        self._client = OpenAiClient(_server(config), "/embeddings", self._parse, "list of embeddings")
        self.limit = config.endpoint_characters
        self.batch_documents = BATCH if config.batch_documents == "auto" else config.batch_documents
        ((_, vectors),) = self._client.ask([self._body([PROBE])])
        self._server_dimension = vectors.shape[1]
        if config.dimensions > self._server_dimension:
            problem = f"{config.model} has {self._server_dimension}"
            raise UserError(f"embed.dimensions = {config.dimensions}", problem, "set it to no more than that")
        self.dimension = config.dimensions or self._server_dimension
        self.counts = {"endpoint": self._client.url, "maximum_characters": self.limit}
        self.description = f"at {config.endpoint}: the first {self.limit} characters of each"

    def lengths_of(self, texts: Sequence[str]) -> np.ndarray:
        """Return the characters of each text, before any is cut off. int64 [texts]."""
        return np.array([len(text) for text in texts], np.int64)

    def encode(
        self,
        texts: Sequence[str],
        progress: Callable[[int], object] | None = None,
        *,
        lengths: np.ndarray | None = None,
        name: Callable[[int], str] = lambda row: f"text {row}",
    ) -> np.ndarray:
        """Return the unit vectors of texts. float32 [texts, dimension].

        Args:
            texts: in any order; the first `embed.endpoint_characters` of each are sent.
            progress: called with the number of texts after each batch.
            lengths: of no use here.
            name: returns what a text is, for the message.

        Raises:
            UserError: a vector is not finite or has the length 0, the vectors of a response have another dimension than those
                before, or the server refuses.
            TransientError: a request still fails after the last attempt.
        """
        size, vectors = self.batch_documents, np.empty((len(texts), self.dimension))
        heads = [self._config.prompt + text[: self.limit] for text in texts]
        bodies = [self._body(heads[start : start + size]) for start in range(0, len(texts), size)]
        for batch, rows in self._client.ask(bodies):
            vectors[batch * size : batch * size + size] = rows[:, : self.dimension]
            if progress is not None:
                progress(len(rows))
        with np.errstate(over="ignore"):  # an infinite length is refused
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        check_lengths(norms[:, 0], name, REMEDY)
        return (vectors / norms).astype(np.float32)

    def flops(self, lengths: np.ndarray) -> float:
        """Return 0: what the server computes is not known."""
        return 0.0

    def _body(self, texts: Sequence[str]) -> dict[str, Any]:
        return {"model": self._config.model, "input": list(texts), "encoding_format": "float"}

    def _parse(self, body: dict[str, Any], response: bytes) -> np.ndarray:
        """Return the vectors of a response in the order of the texts, float64 [texts, dimension of the server].

        Raises:
            ValueError: it is no list of embeddings, one of each text.
            UserError: another dimension than before.
        """
        count = len(body["input"])
        try:
            data = json.loads(response)["data"]
            rows = {row["index"]: np.array(row["embedding"], np.float64) for row in data}  # null becomes NaN
        except (LookupError, TypeError, ValueError, OverflowError, RecursionError):
            raise ValueError(response[:80].decode(errors="replace")) from None
        if len(data) != count or rows.keys() != set(range(count)):
            raise ValueError(f"{count} texts have {len(data)} embeddings, with the indices {shorten(sorted(map(str, rows)))}")
        shapes = {row.shape for row in rows.values()}
        if len(shapes) != 1 or any(len(shape) != 1 for shape in shapes):
            raise ValueError(f"embeddings have the shapes {', '.join(map(str, sorted(shapes)))}")
        vectors = np.stack([rows[index] for index in range(count)])
        if self._server_dimension and vectors.shape[1] != self._server_dimension:
            problem = f"gives vectors of {vectors.shape[1]} components, and gave {self._server_dimension} before"
            raise UserError(self._client.url, problem, "embed the whole corpus with one model: rerun with --force")
        return vectors
