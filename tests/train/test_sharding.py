"""Sharding does not change what a model computes; the largest models take steps with fake tensors, without a device."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from sbp_fast.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError
from sbp_fast.model.flops import parameters
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.distributed import Processes, join_processes
from sbp_fast.train.data.batches import NO_TARGET, PackedBatch
from sbp_fast.train.loop import train_step
from sbp_fast.train.optimizer import make_optimizers
from sbp_fast.train.sharding import build, make_mesh
from sbp_fast.train.update import local

CPU = torch.device("cpu")
SHAPE = ModelConfig(layers=3, hidden_size=32, heads=4, kv_heads=2, head_dim=8, intermediate_size=48)


def make_batch(length: int, vocabulary_size: int, seed: int = 0) -> PackedBatch:
    """Two documents and padding."""
    tokens = np.random.default_rng(seed).integers(3, vocabulary_size, length - 4)
    targets = np.append(tokens[1:], NO_TARGET)
    half = len(tokens) // 2
    targets[half - 1] = NO_TARGET
    return PackedBatch.build(tokens, targets, [half, len(tokens) - half], length=length)


def make_model(parallel: ParallelConfig, recipe: TrainConfig, processes: Processes) -> Transformer:
    model = build(SHAPE, 50, recipe, parallel, processes.device, make_mesh(recipe, parallel, processes))
    model.initialize(0)
    return model


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[operation.name()] += 1
        return operation(*args, **(kwargs or {}))


def gradients(model: Transformer) -> list[Tensor]:
    """Return the gradients of one packed sequence."""
    batch = make_batch(64, 50)
    model(batch.tokens, batch.layout, batch.targets, batch.loss_rows).backward()
    return [local(parameter.grad) for parameter in model.parameters()]


def error(mine: list[Tensor], exact: list[Tensor]) -> float:
    return sum((a.double() - b).square().sum().item() for a, b in zip(mine, exact, strict=True)) ** 0.5


def test_activation_checkpointing_changes_recomputation_but_no_bit_of_the_gradients() -> None:
    gradients_by_choice, recomputed, saved = {}, {}, {}
    batch = make_batch(64, 50)
    for choice in ("none", "selective", "full"):
        model = make_model(ParallelConfig(activation_checkpointing=choice), TrainConfig(), Processes(0, 1, CPU))
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=tensors: to.append(x) or x, lambda x: x):
            loss = model(batch.tokens, batch.layout, batch.targets, batch.loss_rows)
        with Operations() as backward:
            loss.backward()
        gradients_by_choice[choice] = [parameter.grad for parameter in model.parameters()]
        recomputed[choice], saved[choice] = backward.counts, len(tensors)
    for choice in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(gradients_by_choice["none"], gradients_by_choice[choice], strict=True))
        assert saved[choice] < saved["none"]
    products, attention, rotation = "aten::mm", "sbp_kernels::segment_attention", "sbp_kernels::rotation"
    # nobody needs what the last of a layer's four products gave
    assert recomputed["selective"][products] == recomputed["none"][products] == recomputed["full"][products] - 3 * SHAPE.layers
    assert recomputed["selective"][attention] == recomputed["none"][attention] == recomputed["full"][attention] - SHAPE.layers
    assert recomputed["none"][rotation] == 0 < recomputed["selective"][rotation] == recomputed["full"][rotation] == SHAPE.layers


@pytest.mark.slow  # compiling takes half a minute
def test_compiled_layers_compute_the_same() -> None:
    exact = gradients(make_model(ParallelConfig(), TrainConfig(), Processes(0, 1, CPU)).double())
    plain, compiled = (
        gradients(make_model(ParallelConfig(compile=choice), TrainConfig(), Processes(0, 1, CPU))) for choice in (False, True)
    )
    assert error(compiled, exact) <= 2 * error(plain, exact)


def test_layers_in_bfloat16_keep_weights_and_moments_in_float32() -> None:
    recipe = TrainConfig(precision="bfloat16")
    full, exact = (make_model(ParallelConfig(), TrainConfig(), Processes(0, 1, CPU)) for _ in range(2))
    right, plain = gradients(exact.double()), gradients(copy.deepcopy(full).bfloat16())
    with join_processes("cpu", group_of_one=True) as processes:
        model = make_model(ParallelConfig(), recipe, processes)
        assert all(torch.equal(local(a), b) for a, b in zip(model.parameters(), full.parameters(), strict=True))
        mine = gradients(model)
        assert {gradient.dtype for gradient in mine} == {torch.float32}
        assert 2 * error(gradients(full), right) < error(mine, right) <= 2 * error(plain, right)
        optimizers = make_optimizers(model, recipe)
        losses = [train_step(model, iter([make_batch(64, 50)] * 2), 2, optimizers, recipe, 1e-2)[0].item() for _ in range(20)]
        assert losses[-1] < losses[0] / 2
        moments = [value for state in optimizers[0].state.values() for value in state.values()]
        assert {value.dtype for value in [*model.parameters(), *moments]} == {torch.float32}


def test_float8_layers_learn() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    recipe = TrainConfig(float8=True)
    model = make_model(ParallelConfig(), recipe, Processes(0, 1, CPU))
    assert {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")} == {"Float8Linear"}
    optimizers = make_optimizers(model, recipe)
    losses = [train_step(model, iter([make_batch(64, 50)]), 1, optimizers, recipe, 1e-2)[0].item() for _ in range(20)]
    assert losses[-1] < losses[0] / 2


@contextmanager
def fake_processes(world: int) -> Iterator[Processes]:
    """Process 0 of many that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield Processes(0, world, CPU)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "world", "shape"), [pytest.param("3b-1t", 64, (8, 8), marks=pytest.mark.slow), ("6b-1t", 128, (16, 8))]
)
def test_the_papers_models_build_shard_and_take_three_steps_on_no_device(name: str, world: int, shape: tuple[int, int]) -> None:
    config: RunConfig = load_config([name])
    recipe = config.pretrain.model_copy(update={"precision": "bfloat16"})
    batch = make_batch(recipe.microbatch_tokens, config.corpus.vocabulary_size)
    with fake_processes(world) as processes:
        mesh = make_mesh(recipe, config.parallel, processes)
        assert mesh is not None and mesh.shape == shape and recipe.tokens_per_step % (world * recipe.microbatch_tokens) == 0
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = build(config.model, config.corpus.vocabulary_size, recipe, config.parallel, CPU, mesh)
            optimizers = make_optimizers(model, recipe)
            for _ in range(3):  # in this mode whatever would wait for the device raises
                loss, norm, counts = train_step(model, iter([batch] * 2), 2, optimizers, recipe, 1e-4)
                assert isinstance(loss, FakeTensor) and isinstance(norm, FakeTensor) and loss.shape == norm.shape == ()
            whole = sum(parameter.numel() for parameter in model.parameters())
            mine = sum(local(parameter).numel() for parameter in model.parameters())
    assert whole == parameters(config.model, config.corpus.vocabulary_size)
    assert mine * 8 == whole and counts.tokens == 2 * recipe.microbatch_tokens


def test_processes_that_cannot_be_grouped_are_refused() -> None:
    with fake_processes(6) as processes, pytest.raises(UserError, match="4 does not divide the 6 processes"):
        make_mesh(TrainConfig(), ParallelConfig(shard_processes=4), processes)
