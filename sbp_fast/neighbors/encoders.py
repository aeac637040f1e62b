"""The encoder that the configuration asks for: on this machine, or behind a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from sbp_fast.config import EmbedConfig
from sbp_fast.neighbors.encoder import SentenceEncoder
from sbp_fast.neighbors.endpoint_encoder import EndpointEncoder


class TextEncoder(Protocol):
    """A model that turns texts into unit vectors.

    Attributes:
        dimension: components of a vector.
        batch_documents: texts encoded together.
        limit: longer texts are cut here, in the unit of `lengths_of`.
        counts: what it is, for the manifest.
        description: where it runs and what it embeds, for a line on the terminal.
    """

    dimension: int
    batch_documents: int
    limit: int
    counts: dict[str, Any]
    description: str

    def lengths_of(self, texts: Sequence[str]) -> np.ndarray:
        """Return the length of each text before any is cut: tokens of the model, or characters where its tokenizer is away."""
        ...

    def encode(
        self,
        texts: Sequence[str],
        progress: Callable[[int], object] | None = None,
        *,
        lengths: np.ndarray | None = None,
        name: Callable[[int], str] = ...,
    ) -> np.ndarray:
        """Return the unit vectors of texts. float32 [texts, dimension]."""
        ...

    def flops(self, lengths: np.ndarray) -> float:
        """Return the floating-point operations of encoding texts of such lengths, as far as they are known."""
        ...


def open_encoder(config: EmbedConfig, device: str, threads: int) -> TextEncoder:
    """Return the model at `embed.endpoint`, or else the one that is loaded here.

    Raises:
        UserError: it cannot be loaded, or the server refuses.
    """
    return EndpointEncoder(config) if config.endpoint else SentenceEncoder(config, device, threads)
