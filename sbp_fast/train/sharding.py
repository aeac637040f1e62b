"""Building a model that is sharded over the processes of a run with FSDP2, from a model on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from sbp_kernels import attention_operations
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sbp_fast.config import ModelConfig, ParallelConfig, TrainConfig
from sbp_fast.errors import UserError
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.distributed import Processes

# with the attention of the registered backends, all that is costly to compute again
PRODUCTS = ("aten::mm", "aten::_scaled_mm")


def resolve_precision(recipe: TrainConfig, device: str | torch.device) -> torch.dtype:
    """Return the dtype that the layers compute in."""
    if recipe.precision == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32


def make_mesh(recipe: TrainConfig, parallel: ParallelConfig, processes: Processes) -> DeviceMesh | None:
    """Return the device mesh over which weights are sharded.

    The last dimension, "shard", is the one over which they are sharded. Where `shard_processes` is less than the number of
    processes, a dimension "replica" precedes it.

    Returns:
        The mesh; None for a single process in float32, which needs no sharding.

    Raises:
        UserError: `shard_processes` does not divide the number of processes.
    """
    world, kind, together = processes.world, processes.device.type, parallel.shard_processes
    if world == 1 and resolve_precision(recipe, kind) == torch.float32:
        return None
    if together in (0, world):
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    if world % together:
        problem = f"{together} does not divide the {world} processes"
        raise UserError("parallel.shard_processes", problem, "set it to a divisor, such as the GPUs of a node, or to 0")
    return init_device_mesh(kind, (world // together, together), mesh_dim_names=("replica", "shard"))


def build(
    config: ModelConfig,
    vocabulary_size: int,
    recipe: TrainConfig,
    parallel: ParallelConfig,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> Transformer:
    """Return a model sharded over the mesh, with uninitialised weights on `device`.

    The model is created on the meta device, so that no process ever holds it whole.

    Raises:
        UserError: a setting cannot run here.
    """
    with torch.device("meta"):
        model = Transformer(config, vocabulary_size)
    if recipe.float8:
        _convert_to_float8(model)
    for block in model.layers:
        assert isinstance(block, nn.Module)
        _checkpoint_activations(block, parallel.activation_checkpointing)
        if parallel.compile is True or (parallel.compile == "auto" and device.type == "cuda"):
            block.compile()
    if mesh is not None:
        shard(model, mesh, resolve_precision(recipe, device.type), parallel)
    return model.to_empty(device=device)


def shard(model: Transformer, mesh: DeviceMesh, dtype: torch.dtype, parallel: ParallelConfig) -> None:
    """Apply FSDP2 to each block and to the rest of the model; gradients are summed in float32 and not averaged."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    reshard = parallel.reshard_after_forward and not parallel.gather_once
    blocks: list[Any] = list(model.layers)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # the factor of 1 as a plain sum, which gloo can do
    _prefetch(blocks, parallel.prefetch_layers)


def _prefetch(blocks: Sequence[FSDPModule], layers: int) -> None:
    for index, block in enumerate(blocks):
        ahead, behind = blocks[index + 1 : index + 1 + layers], blocks[max(index - layers, 0) : index]
        block.set_modules_to_forward_prefetch(list(ahead))
        block.set_modules_to_backward_prefetch(list(reversed(behind)))


def accumulate(model: nn.Module, sequences: Iterable[Any], count: int, gather_once: bool) -> Iterator[Any]:
    """Yield the packed sequences of a step, with the model set so that gradients are reduced once, after the last."""
    for index, sequence in enumerate(sequences):
        last = index + 1 == count
        if isinstance(model, FSDPModule) and count > 1:
            model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)
            if gather_once:
                model.set_reshard_after_backward(last)
        yield sequence


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep all weights whole on every process, for reading; all processes enter and leave together."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward pass without a backward pass has left gathered: they are stale after the next update."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _checkpoint_activations(block: nn.Module, choice: str) -> None:
    if choice == "none":
        return
    # replaces `forward` and not the module, so that weights keep their names and FSDP's hooks run outside the checkpoint
    block.forward = partial(_checkpointed, block.forward, choice)


def _checkpointed(forward: Callable[..., Any], choice: str, *inputs: Any) -> Any:
    if choice == "full":
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, partial(_save_costly_operations, attention_operations()))
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _save_costly_operations(attention: tuple[str, ...], _: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name()
    costly = name in PRODUCTS or name.startswith(attention)
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def _convert_to_float8(model: Transformer) -> None:
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise UserError("float8 = true", f"needs torchao: {error}", "pip install torchao, or set it to false") from None
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name.startswith("layers."))
