"""A model on disk: `weights.safetensors` and `model.json`, which holds its shape."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sbp_fast.config import ModelConfig
from sbp_fast.errors import UserError
from sbp_fast.files import atomic_path, read_json, write_json
from sbp_fast.model.transformer import Transformer

FORMAT = 1
WEIGHTS, MODEL = "weights.safetensors", "model.json"


def save_model(model: Transformer, directory: Path) -> None:
    """Write the weights (a tied head once) and then, as the sign that they are whole, `model.json`."""
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    with atomic_path(directory / WEIGHTS) as temporary:
        save_file(weights, temporary)
    facts = {"format": FORMAT, "model": model.config.model_dump(mode="json"), "vocabulary_size": model.vocabulary_size}
    write_json(directory / MODEL, facts)


def load_model(directory: str | Path, device: torch.device | str = "cpu") -> Transformer:
    """The saved model, in evaluation mode on `device`.

    Raises:
        UserError: no saved model there, or one whose weights do not fit its `model.json`.
    """
    path = Path(directory) / MODEL
    if not path.is_file():
        raise UserError(directory, "holds no saved model", "give the output of `sbp-fast train` or `sbp-fast import`")
    try:
        facts = read_json(path)
        config, vocabulary_size = ModelConfig(**facts["model"]), int(facts["vocabulary_size"])
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError, KeyError, TypeError) as error:
        raise UserError(path, f"is not a model's description: {error!r}", "train or import the model again") from None
    if facts.get("format") != FORMAT:
        raise UserError(path, f"format {facts.get('format')} is not {FORMAT}", "train or import the model again")
    try:
        weights = load_file(Path(directory) / WEIGHTS)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(Path(directory) / WEIGHTS, f"cannot be read: {error}", "train or import the model again") from None
    model = Transformer(config, vocabulary_size)
    fill(model, weights, where=Path(directory) / WEIGHTS)
    return model.to(device).eval()


def fill(model: Transformer, weights: dict[str, Tensor], where: Path) -> None:
    """Copy `weights` into the model.

    Raises:
        UserError: naming the tensor that is missing, left over or of another shape.
    """
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() | weights.keys()):
        wanted = tuple(parameters[name].shape) if name in parameters else "no tensor of that name"
        found = tuple(weights[name].shape) if name in weights else "none"
        if wanted != found:
            raise UserError(where, f"{name}: the model has {wanted}, the file {found}", "give the weights of this very model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
