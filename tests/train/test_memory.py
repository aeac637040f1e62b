"""Memory estimates of a training step, compared with the bytes that are allocated while one runs.

Every tensor's storage is watched from the operation that makes it, in float32 and with the kernels' own operations, interpreted
where there is no GPU.
"""

import gc
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sbp_kernels import PackedLayout
from sbp_kernels.linear_cross_entropy import launch, operations, resolve_mode
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sbp_fast.config import ModelConfig, ParallelConfig, TrainConfig
from sbp_fast.experiment.costs import BANDWIDTH
from sbp_fast.model.flops import PEAK_FLOPS, matrix_parameters, parameters
from sbp_fast.model.transformer import Transformer
from sbp_fast.train import memory
from sbp_fast.train.optimizer import OPTIMIZERS, make_optimizers
from sbp_fast.train.sharding import build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = ModelConfig(layers=2, hidden_size=48, heads=4, kv_heads=2, head_dim=16, intermediate_size=80, context=64)
VOCABULARY, TOKENS, SIZE = 96, 64, 4


class Living(TorchDispatchMode):
    """Bytes of the storages that operations have made and nobody has let go of yet."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.given:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, self.bytes())
        return out

    def bytes(self) -> int:
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        return sum(size for _, size in self.made.values())


@pytest.fixture(autouse=True)
def _small_operations_run_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They choose plain torch on the CPU, which saves other tensors; importlib, since functions hide modules of their name."""
    for name in ("norm", "rope", "swiglu"):
        monkeypatch.setattr(importlib.import_module(f"sbp_kernels.{name}.api"), "runs_triton", lambda backend, x: True)


def forward(config: ModelConfig, checkpointing: Any) -> tuple[Living, Callable[[], torch.Tensor]]:
    """Return a watch, and a function that computes the loss of one packed sequence."""
    parallel = ParallelConfig(activation_checkpointing=checkpointing, compile=False)
    model = build(config, VOCABULARY, TrainConfig(precision="float32"), parallel, DEVICE, None)
    model.initialize(0)
    layout = PackedLayout.from_tree([20, 30, 14], [-1, 0, -1]).planned().to(DEVICE)
    tokens = torch.arange(TOKENS, device=DEVICE)
    assert layout.plan is not None
    given = [*model.parameters(), tokens, layout.visible_until, layout.positions, *layout.plan.tables]
    return Living(given), lambda: model(tokens, layout, tokens, tokens, "triton")


@pytest.mark.parametrize("checkpointing", memory.CHECKPOINTING)
@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"layers": 3, "kv_heads": 4}])
def test_bytes_saved_for_the_backward_pass_are_exact(checkpointing: str, changes: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update=changes)
    living, compute = forward(config, checkpointing)
    with living:
        loss = compute()
    gc.collect()  # the rows that the loss was computed from linger until then, or until the backward pass
    layers = config.layers * memory.layer_bytes(config, TOKENS, SIZE, checkpointing)
    rows, roots, table = TOKENS * config.hidden_size * SIZE, TOKENS * SIZE, VOCABULARY * config.hidden_size * SIZE
    loss_and_its_scale = 2 * SIZE
    assert living.bytes() == layers + (rows + roots) + (rows + table) + loss_and_its_scale
    assert loss.requires_grad


@pytest.mark.parametrize("checkpointing", memory.CHECKPOINTING)
def test_peak_of_a_layers_backward_pass_is_exact(checkpointing: str) -> None:
    config = CONFIG.model_copy(update={"layers": 1, "intermediate_size": 400})  # the layer outweighs the loss
    living, compute = forward(config, checkpointing)
    with living:
        loss = compute()
        living.most = 0
        loss.backward()
    kept = memory.layer_bytes(config, TOKENS, SIZE, checkpointing)
    again = memory.recomputed_bytes(config, TOKENS, SIZE, checkpointing)
    work = memory.layer_backward_bytes(config, TOKENS, SIZE)
    gradients = SIZE * (
        VOCABULARY * config.hidden_size + config.hidden_size + 3 * config.hidden_size * config.intermediate_size
    )
    loss_and_its_gradient = 2 * SIZE
    # "selective" has let go of the result of a product that nothing but the layer's own output is made of
    gone = TOKENS * config.hidden_size * SIZE if checkpointing == "selective" else 0
    assert living.most == kept + again + work + gradients + loss_and_its_gradient - gone


def test_peak_of_the_backward_pass_of_the_loss_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "slab_rows", lambda *_: 0)  # the slab of the forward pass is gone by then
    config = CONFIG.model_copy(update={"layers": 1, "intermediate_size": 1})  # the loss outweighs the layer
    living, compute = forward(config, "none")
    with living:
        loss = compute()
        living.most = 0
        loss.backward()
    layer = memory.layer_bytes(config, TOKENS, SIZE, "none")
    loss_and_its_gradient_and_two_scales = 4 * SIZE
    assert living.most == layer + memory.loss_bytes(config, VOCABULARY, TOKENS, SIZE) + loss_and_its_gradient_and_two_scales


@pytest.mark.parametrize("vocabulary", [96, 8192, 49_152, 151_936])
@pytest.mark.parametrize("rows", [64, 3000, 16_384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slabs_and_panels_are_those_of_the_loss(vocabulary: int, rows: int, dtype: torch.dtype) -> None:
    size, limit = dtype.itemsize, operations.default_slab_rows(vocabulary, dtype, "cuda")
    assert memory.slab_rows(vocabulary, rows, size) == min(operations._even(rows, limit), rows)
    assert memory.panel_columns(vocabulary, rows, size) == launch.panel_columns(rows, vocabulary, dtype)
    for width in (2, 128, 4096, 8192):
        slabs = resolve_mode(vocabulary, width, dtype, device_type="cuda") == "slab"
        assert memory.keeps_slabs(vocabulary, width, size) == slabs


@pytest.mark.parametrize("slabs", [True, False])
def test_peak_of_the_loss_exceeds_its_figure_by_at_most_a_few_numbers_a_row(
    slabs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, width, vocabulary = 256, 64, 1000
    monkeypatch.setattr(memory, "SLAB_MODE_BYTES", 1 << 32 if slabs else 0)
    for module in (memory, launch):
        monkeypatch.setattr(module, "PANEL_BYTES", 1 << 20)
    weight, targets = torch.randn(vocabulary, width, device=DEVICE), torch.zeros(rows, device=DEVICE).int()
    every, count = torch.arange(rows, device=DEVICE).int(), torch.tensor(rows, device=DEVICE).int()
    how = (0.0, False, "triton", "recompute", 0)
    with Living([weight, targets, every, count]) as living:
        inputs = (torch.ones(rows, width, device=DEVICE), weight, targets, every, count)
        if slabs:
            slab = memory.slab_rows(vocabulary, rows, SIZE)
            operations.total_loss(*inputs, torch.ones(rows, device=DEVICE), 0.0, 0.0, 0.0, "triton", slab, True, True)
        else:
            statistics = operations.logit_statistics(*inputs, *how)
            gc.collect()  # the interpreter's last calls
            living.most = 0
            operations.logit_statistics_backward(torch.ones(3, rows, device=DEVICE), statistics, *inputs, *how, True, True)
    last_norm_has_kept = rows * (width + 1) * SIZE
    figure = memory.loss_bytes(CONFIG.model_copy(update={"hidden_size": width}), vocabulary, rows, SIZE) - last_norm_has_kept
    assert figure <= living.most <= figure + 16 * rows * SIZE


def test_optimizer_bytes_are_those_of_the_moments() -> None:
    model = Transformer(CONFIG, VOCABULARY)
    for name in OPTIMIZERS:
        optimizers = make_optimizers(model, TrainConfig(optimizer=name))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
        states = [tensor for optimizer in optimizers for state in optimizer.state.values() for tensor in state.values()]
        moments = sum(tensor.nbytes for tensor in states if tensor.dim())  # the rest are counts of steps
        assert memory.optimizer_bytes(CONFIG, VOCABULARY, name) == moments


def test_accumulated_gradients_are_unsharded_until_the_last_sequence() -> None:
    """What FSDP2 does, in a group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(8, 16, bias=False)
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
        for last in (False, True):
            model.set_requires_gradient_sync(last)
            model(torch.ones(2, 8)).sum().backward()
            whole = model._get_fsdp_state()._fsdp_param_group.fsdp_params[0].unsharded_accumulated_grad
            shapes = [None if x is None else (*x.shape, x.dtype) for x in (whole, model.weight.grad)]
            assert shapes == ([None, (16, 8, torch.float32)] if last else [(16, 8, torch.float32), None])
    finally:
        dist.destroy_process_group()


def test_a_step_adds_up_on_many_gpus() -> None:
    """By hand, of a model of one million weights in each layer."""
    config = ModelConfig(layers=10, hidden_size=512, heads=4, kv_heads=4, head_dim=32, intermediate_size=512, qk_norm=False)
    layer, rest = 4 * 512 * 128 + 3 * 512 * 512 + 2 * 512, 1000 * 512 + 512
    assert parameters(config, 1000) == 10 * layer + rest
    recipe = TrainConfig(tokens_per_step=65_536, microbatch_tokens=1024)

    def memory_of(gpus: int, recipe: TrainConfig = recipe, **parallel: Any) -> memory.StepMemory:
        return memory.step_memory(config, 1000, recipe, ParallelConfig(**parallel), gpus)

    every = memory_of(16)
    assert every.weights == every.optimizer / 2 == 4 * (10 * layer + rest) / 16
    assert every.gradients == 4 * (10 * layer + rest)  # four microbatches for each
    assert memory_of(64).gradients == 4 * (10 * layer + rest) / 64
    assert memory_of(64, shard_processes=8).weights == 4 * (10 * layer + rest) / 8
    assert every.gathered == 2 * (rest + 3 * layer) and memory_of(16, prefetch_layers=3).gathered == 2 * (rest + 5 * layer)
    for settings in ({"gather_once": True}, {"reshard_after_forward": False}):
        assert memory_of(16, **settings).gathered == 2 * (rest + 10 * layer)
    assert every.reduced == 6 * layer
    assert memory_of(16, activation_checkpointing="full").activations == 10 * 1024 * 512 * 2
    assert (
        memory_of(16, recipe.model_copy(update={"optimizer": "muon"})).optimizer
        == every.optimizer - matrix_parameters(config) / 4
    )
    wide = recipe.model_copy(update={"precision": "float32"})
    assert memory_of(2, wide).gathered == 2 * every.gathered and memory_of(1, wide).gathered == memory_of(1, wide).reduced == 0
    assert every.total == sum(vars(every).values())


def test_every_card_has_all_its_figures() -> None:
    assert memory.CARD_MEMORY.keys() == PEAK_FLOPS.keys() == BANDWIDTH.keys()
    assert memory.usable_memory("h100") == 81_559 * 2**20 * 0.95 - 2 * 2**30
