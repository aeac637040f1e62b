"""Optimizers that a recipe may name: how each is built for a model, and how many bytes its state takes.

torch is imported where an optimizer is built: `sbp-fast plan` and the configuration read this table without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from sbp_fast.config import ModelConfig, TrainConfig
from sbp_fast.model.flops import matrix_parameters, parameters
from sbp_fast.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn

Optimizers: TypeAlias = "list[torch.optim.Optimizer]"


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer as the registry holds it.

    Attributes:
        make: builds the optimizers of a model; together they hold every parameter that requires a gradient exactly once.
        state_bytes: bytes of state for a model of this shape and vocabulary size, before sharding.
    """

    make: Callable[[nn.Module, TrainConfig], Optimizers]
    state_bytes: Callable[[ModelConfig, int], int]


OPTIMIZERS: Registry[OptimizerEntry] = Registry("optimizer")
"""What `pretrain.optimizer` and `synthesizer.optimizer` may name."""


def make_optimizers(model: nn.Module, recipe: TrainConfig) -> Optimizers:
    """Return the optimizers that `recipe.optimizer` names, for the parameters of `model`."""
    return OPTIMIZERS[recipe.optimizer].make(model, recipe)


def make_adamw(model: nn.Module, recipe: TrainConfig) -> Optimizers:
    """Return AdamW (Loshchilov and Hutter 2019) that decays matrices alone: norm gains have no reason to be small."""
    return [_adamw([parameter for parameter in model.parameters() if parameter.requires_grad], recipe)]


def make_muon(model: nn.Module, recipe: TrainConfig, *, float32: bool = False) -> Optimizers:
    """Return Muon (Jordan et al. 2024) for the matrices of the layers and AdamW for all other parameters.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, section 2.2), so that one learning rate and one
    weight decay serve both.

    Args:
        model: its parameters are optimized.
        recipe: learning rate and weight decay.
        float32: orthogonalise in float32, not in bfloat16.
    """
    import torch

    from sbp_fast.train.muon import Float32Muon

    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in trained if _is_layer_matrix(name, parameter)]
    others = [parameter for name, parameter in trained if not _is_layer_matrix(name, parameter)]
    if not matrices:
        return [_adamw(others, recipe)]
    kind = Float32Muon if float32 else torch.optim.Muon
    muon = kind(matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, _adamw(others, recipe)]


def adamw_state_bytes(config: ModelConfig, vocabulary_size: int) -> int:
    """Return the bytes of two float32 moments of each parameter."""
    return 8 * parameters(config, vocabulary_size)


def muon_state_bytes(config: ModelConfig, vocabulary_size: int) -> int:
    """Return the bytes of one float32 moment of each layer matrix, and of two of each other parameter."""
    return adamw_state_bytes(config, vocabulary_size) - 4 * matrix_parameters(config)


def _is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    return name.startswith("layers.") and parameter.dim() == 2


def _adamw(trained: list[nn.Parameter], recipe: TrainConfig) -> torch.optim.Optimizer:
    import torch

    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, eps=recipe.epsilon, fused=True)


OPTIMIZERS.register("adamw", OptimizerEntry(make_adamw, adamw_state_bytes))
OPTIMIZERS.register("muon", OptimizerEntry(make_muon, muon_state_bytes))
OPTIMIZERS.register("muon-float32", OptimizerEntry(partial(make_muon, float32=True), muon_state_bytes))
