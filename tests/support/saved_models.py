"""Small saved models with random weights, and changes of their exports."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sbp_fast.config import ModelConfig
from sbp_fast.model.saved import save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage

CONFIG = ModelConfig(layers=2, hidden_size=24, heads=4, kv_heads=2, head_dim=16, intermediate_size=40, context=64)
QUIET = Console(quiet=True)


def make_saved(out: Path, vocabulary_size: int, arm: str = "baseline", **changes: object) -> Path:
    model = Transformer(CONFIG.model_copy(update=changes), vocabulary_size)
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():  # gains of one would hide a norm left out or put elsewhere
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)

    def body(work: StageContext) -> None:
        save_model(model, work.directory)
        work.record(arm=arm)

    run_stage("train", out, config={}, inputs={}, body=body, console=QUIET)
    return out


def change_weights(exported: Path, **changes: torch.Tensor) -> None:
    weights = load_file(exported / "model.safetensors")
    weights |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file(weights, exported / "model.safetensors")
