import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from products import hostile_memory
from sbp_kernels import PackedLayout
from sbp_kernels.layout.reference import dense_mask
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from sbp_fast.config import ModelConfig
from sbp_fast.model.transformer import Transformer

CONFIG = ModelConfig(layers=2, hidden_size=16, heads=4, kv_heads=2, head_dim=8, intermediate_size=24, context=32)
TREE = PackedLayout.from_tree([4, 3, 5, 2, 6, 3], [-1, 0, 0, -1, -1, 4])


def make_model(dtype: torch.dtype = torch.float64, **changes: object) -> Transformer:
    model = Transformer(CONFIG.model_copy(update=changes), 50)
    model.initialize(3)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start of training, so that attention is far from even
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model.to(dtype)


def make_sequence(layout: PackedLayout) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 50, (len(layout),), generator=generator), torch.randint(0, 50, (len(layout),), generator=generator)


def test_the_gradient_of_an_output_touches_only_what_its_token_may_see() -> None:
    model, (tokens, _) = make_model(), make_sequence(TREE)
    embedded = model.embed_tokens(tokens).detach().requires_grad_()
    model.embed_tokens.forward = lambda _: embedded
    hidden = model(tokens, TREE)
    for token in range(len(TREE)):
        (gradient,) = torch.autograd.grad(hidden[token].sum(), embedded, retain_graph=True)
        assert torch.equal((gradient != 0).any(1), dense_mask(TREE)[token])


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": False}, {"qk_norm": False}])
def test_a_shared_seed_equals_its_pairs_run_alone(changes: dict[str, bool]) -> None:
    model, (tokens, targets) = make_model(**changes), make_sequence(TREE)
    starts = [0, 4, 7, 12, 14, 20, 23]
    chunks = [slice(start, stop) for start, stop in pairwise(starts)]
    paths = {1: [0, 1], 2: [0, 2], 3: [3], 5: [4, 5]}  # the segments that carry loss, each with all that it sees
    targets = targets.clone()
    for root in (0, 4):
        targets[chunks[root]] = -100
    packed = model(tokens, TREE, targets)
    packed_gradients = torch.autograd.grad(packed, list(model.parameters()))
    alone = torch.zeros((), dtype=torch.float64)
    for path in paths.values():
        own, goals = (torch.cat([x[chunks[segment]] for segment in path]) for x in (tokens, targets))
        alone = alone + model(own, PackedLayout.from_lengths([len(own)]), goals)
    torch.testing.assert_close(packed, alone, rtol=1e-13, atol=0)
    for mine, theirs in zip(packed_gradients, torch.autograd.grad(alone, list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_in_hostile_memory(dtype: torch.dtype) -> None:
    """Where products read what lies beside their operands, and memory that nothing has written is NaN."""
    model, (tokens, targets) = make_model(dtype), make_sequence(TREE)
    targets[::3] = -100

    def step() -> list[Tensor]:
        loss = model(tokens, TREE, targets)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    expected = step()
    with hostile_memory() as products:
        actual = step()
    assert products.count > 30
    assert all(torch.equal(mine, right) for mine, right in zip(actual, expected, strict=True))


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, (tokens, targets) = make_model(tied_embeddings=False), make_sequence(TREE)
    targets[::3] = -100
    logits = model.logits(model(tokens, TREE))
    right = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(model(tokens, TREE, targets), right, rtol=1e-13, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_rows_that_may_carry_loss_go_through_the_last_norm_and_the_output_projection(tied: bool) -> None:
    model, (tokens, targets) = make_model(tied_embeddings=tied), make_sequence(TREE)
    targets[::3] = -100
    rows = (targets != -100).nonzero().squeeze(1)
    padded = torch.cat([rows, torch.tensor([6, 6, 6])])
    everything = model(tokens, TREE, targets)
    expected = torch.autograd.grad(everything, list(model.parameters()))
    absent = torch.ones(len(TREE), dtype=torch.bool).index_fill(0, padded, False)
    model.layers[-1].register_forward_hook(lambda _, inputs, out_TW: out_TW.masked_fill(absent.unsqueeze(1), float("nan")))
    loss = model(tokens, TREE, targets, padded)
    torch.testing.assert_close(loss, everything, rtol=1e-14, atol=0)
    for mine, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-14)


def test_weights_depend_on_the_seed_alone() -> None:
    model, drawn = Transformer(CONFIG, 50), []
    for others, seed in [(0, 3), (1, 3), (1, 4)]:
        torch.manual_seed(others)
        model.initialize(seed)
        drawn.append([parameter.detach().clone() for parameter in model.parameters() if parameter.dim() > 1])
    one, same, other = drawn
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_weight_is_sampled_separately_with_its_own_deviation() -> None:
    model = Transformer(CONFIG.model_copy(update={"tied_embeddings": False}), 50)
    model.initialize(3)
    into_stream = (2 * CONFIG.layers) ** -0.5
    deviations = {"embed_tokens": 0.02, "o_proj": 32**-0.5 * into_stream, "down_proj": 24**-0.5 * into_stream}
    drawn = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        deviation = deviations.get(name.split(".")[-2], 16**-0.5)
        drawn[name] = parameter.detach() / deviation
        assert abs(drawn[name].std() - 1) < 5 * (2 * parameter.numel()) ** -0.5, name
    numbers = torch.cat([values.flatten() for values in drawn.values()])
    assert len(numbers.unique()) > 0.99 * len(numbers)


@pytest.mark.parametrize("tied", [True, False])
def test_model_created_on_the_meta_device_is_the_same(tied: bool) -> None:
    config, (tokens, targets) = CONFIG.model_copy(update={"tied_embeddings": tied}), make_sequence(TREE)
    with torch.device("meta"):
        model = Transformer(config, 50)
    model.to_empty(device="cpu")
    whole = Transformer(config, 50)
    for each in (model, whole):
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.fill_(float("nan"))
        each.initialize(3)
    assert list(model.state_dict()) == list(whole.state_dict()) == [name for name, _ in model.named_parameters()]
    assert torch.equal(model(tokens, TREE, targets), whole(tokens, TREE, targets))


@contextmanager
def alone_among(rank: int, world: int) -> Iterator[None]:
    """This process as `rank` of `world`, with nobody to talk to."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()


def make_sharded(mesh: DeviceMesh, config: ModelConfig = CONFIG) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config, 50)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    model.to_empty(device="cpu")
    with CommDebugMode() as communication:
        model.initialize(3)
    assert communication.get_total_counts() == 0
    return model


@pytest.mark.parametrize("mesh", [(3,), (10,), (2, 3)], ids=["uneven", "empty", "replicated"])
def test_weights_are_the_same_however_they_are_sharded(mesh: tuple[int, ...]) -> None:
    whole = Transformer(CONFIG, 50)
    whole.initialize(3)
    shards: list[list[Tensor]] = []
    world = math.prod(mesh)
    for rank in range(world):
        with alone_among(rank, world):
            names = [f"dimension {index} of rank {rank}" for index in range(len(mesh))]  # torch caches equal meshes
            parameters = list(make_sharded(init_device_mesh("cpu", mesh, mesh_dim_names=names)).parameters())
            assert all(isinstance(parameter, DTensor) for parameter in parameters)
            shards.append([parameter.to_local().detach() for parameter in parameters])
    replicas = [shards[start : start + mesh[-1]] for start in range(0, world, mesh[-1])]
    assert any(len(part) == 0 for part in shards[-1]) == (mesh == (10,))
    for replica in replicas:
        for parameter, *parts in zip(whole.parameters(), *replica, strict=True):
            assert torch.equal(torch.cat(parts), parameter)


def compare_sharded_with_whole(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    tokens, targets = make_sequence(TREE)
    targets[::3] = -100
    rows = (targets != -100).nonzero().squeeze(1)
    for tied in (True, False):
        config = CONFIG.model_copy(update={"tied_embeddings": tied})
        sharded, whole = make_sharded(init_device_mesh("cpu", (2,)), config), Transformer(config, 50)
        whole.initialize(3)
        losses = [model(tokens, TREE, targets, rows) for model in (sharded, whole)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        for mine, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
            assert torch.equal(mine.grad.full_tensor(), theirs.grad)  # the mean of two that are the same
    dist.destroy_process_group()


def test_a_sharded_model_has_the_loss_and_gradients_of_the_whole(tmp_path: Path) -> None:
    multiprocessing.spawn(functools.partial(compare_sharded_with_whole, store=str(tmp_path / "store")), nprocs=2)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_compiled_block_is_the_same_and_takes_any_layout(qk_norm: bool) -> None:
    torch._dynamo.reset()
    model = make_model(torch.float32, qk_norm=qk_norm)
    counter = CompileCounterWithBackend("aot_eager")
    block = model.layers[0]
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    x_TW = torch.randn(23, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layouts = [TREE, PackedLayout.from_lengths([23]), PackedLayout.from_lengths([11, 12]), PackedLayout.from_pairs([(11, 12)])]
    outputs = []
    for layout in layouts:
        outputs.append(compiled(x_TW, layout, "auto"))
        plain = block(x_TW, layout, "auto")
        assert torch.equal(outputs[-1], plain)
        gradients = [torch.autograd.grad(out.sum(), [x_TW, *block.parameters()]) for out in (outputs[-1], plain)]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))
    assert counter.frame_count == 1  # compiled once, for all of them
    assert all(not torch.equal(one, other) for one, other in pairwise(outputs))


def test_autocast_keeps_the_loss_within_the_rounding_of_its_dtype() -> None:
    model, (tokens, targets) = make_model(torch.float32), make_sequence(TREE)
    exact = make_model()(tokens, TREE, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, TREE, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert 0 < abs(loss / exact - 1) < 2**-8
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_the_kernels_give_the_models_loss_and_gradients() -> None:
    model, (tokens, targets) = make_model(torch.float32), make_sequence(TREE)
    exact = model.double()(tokens, TREE, targets)
    right = torch.autograd.grad(exact, list(model.parameters()))
    model.float()
    by_backend = {}
    for backend in ("torch", "triton"):
        loss = model(tokens, TREE, targets, backend=backend)
        by_backend[backend] = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    errors = {backend: relative_error(actual, [exact, *right]) for backend, actual in by_backend.items()}
    assert errors["triton"] <= 2 * errors["torch"]


@torch.no_grad()
def relative_error(actual: list[Tensor], right: list[Tensor]) -> float:
    """Of all tensors together: the few numbers of a norm's weight alone have a few roundings, whose ratio is chance."""
    return sum(float(((x.double() - value).norm() / value.norm()) ** 2) for x, value in zip(actual, right, strict=True)) ** 0.5
