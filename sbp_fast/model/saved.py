"""Saved models: a directory with `weights.safetensors` and, written last, `model.json` with the shape."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from sbp_fast.config import ModelConfig
from sbp_fast.errors import UserError
from sbp_fast.model.transformer import Transformer, set_parameter
from sbp_fast.pipeline.files import atomic_path, read_json, write_json

FORMAT = 2  # 1: before the fields of `ModelConfig` took the names of Hugging Face's config.json
WEIGHTS, MODEL = "weights.safetensors", "model.json"


def save_model(model: Transformer, directory: Path, *, is_rank0: bool = True) -> None:
    """Write the weights (tied embeddings once) and then `model.json`, whose presence means that the weights are whole.

    All processes of a sharded model call this together.

    Args:
        model: the model, sharded or not.
        directory: an existing directory.
        is_rank0: whether this process writes.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        whole = parameter.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if is_rank0:
            weights[name] = whole.cpu().contiguous()
    if not is_rank0:
        return
    with atomic_path(directory / WEIGHTS) as temporary:
        save_file(weights, temporary)
    shape = model.config.model_dump(mode="json")
    write_json(directory / MODEL, {"format": FORMAT, "model": shape, "vocabulary_size": model.vocabulary_size})


def load_model(directory: str | Path, device: torch.device | str = "cpu") -> Transformer:
    """Return a saved model, in evaluation mode on `device`.

    Raises:
        UserError: no saved model there, or one whose weights do not fit its `model.json`.
    """
    config, vocabulary_size = read_description(directory)
    weights = read_weights(Path(directory) / WEIGHTS)
    with torch.device("meta"):
        model = Transformer(config, vocabulary_size)
    return fill(model.to_empty(device=device), weights, where=Path(directory) / WEIGHTS).eval()


def read_description(directory: str | Path) -> tuple[ModelConfig, int]:
    """Return the shape and the vocabulary size of a saved model.

    Raises:
        UserError: no saved model there, or one of another format.
    """
    path = Path(directory) / MODEL
    if not path.is_file():
        raise UserError(directory, "holds no saved model", "give the output of `sbp-fast train` or `sbp-fast import`")
    description = read_json(path)
    try:
        if description["format"] != FORMAT:
            raise UserError(path, f"format {description['format']} is not {FORMAT}", "train or import the model again")
        return ModelConfig(**description["model"]), int(description["vocabulary_size"])
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise UserError(path, f"is not a model's description: {error!r}", "train or import the model again") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU.

    Raises:
        UserError: no such file, or one that is damaged.
    """
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(path, f"cannot be read: {error}", "train, import or download the model again") from None


def fill(model: Transformer, weights: dict[str, Tensor], where: Path) -> Transformer:
    """Copy `weights` into the parameters of the model, or into this process's shards of them, and return the model.

    Raises:
        UserError: a tensor is missing, left over or of another shape; the message names it.
    """
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() | weights.keys()):
        expected = tuple(parameters[name].shape) if name in parameters else "no tensor of that name"
        actual = tuple(weights[name].shape) if name in weights else "none"
        if expected != actual:
            raise UserError(where, f"{name}: the model has {expected}, the file {actual}", "give the weights of this model")
    for name, parameter in parameters.items():
        set_parameter(parameter, weights[name])
    return model
