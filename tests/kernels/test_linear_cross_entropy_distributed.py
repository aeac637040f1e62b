"""Two processes: a vocabulary sharded over them, and the loss inside FSDP2."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from sbp_kernels import linear_cross_entropy
from sbp_kernels.linear_cross_entropy import LinearCrossEntropy
from sbp_kernels.linear_cross_entropy.reference import linear_cross_entropy as exact_cross_entropy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from trees import error

RANKS = 2
ROWS, WIDTH, VOCABULARY = 24, 6, 10


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((ROWS, WIDTH), (VOCABULARY, WIDTH)))
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    targets[::5] = -100
    return hidden, weight, targets


def sharded_vocabulary(rank: int) -> None:
    hidden, weight, targets = inputs()
    hidden[0] = float("nan")  # a row without loss
    mine = slice(rank * VOCABULARY // RANKS, (rank + 1) * VOCABULARY // RANKS)
    upstream, row_weight = torch.linspace(-1, 2, ROWS).double(), torch.linspace(0.5, 2, ROWS).double()
    options: dict[str, Any] = {"z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.2, "row_weight": row_weight}
    for mode in ("slab", "recompute"):
        for reduction in ("sum", "mean", "none"):
            for chosen in ({}, options):
                leaves = hidden.clone().requires_grad_(), weight[mine].clone().requires_grad_()
                group = dist.group.WORLD
                loss = linear_cross_entropy(
                    *leaves, targets, group=group, mode=mode, reduction=reduction, slab_rows=7, **chosen
                )
                found = loss, *torch.autograd.grad((loss * upstream).sum(), leaves)
                leaves = hidden.nan_to_num(0.0).requires_grad_(), weight.clone().requires_grad_()
                exact = exact_cross_entropy(*leaves, targets, reduction=reduction, **chosen)
                expected = exact, *torch.autograd.grad((exact * upstream).sum(), leaves)
                for x, y in zip(found, (*expected[:2], expected[2][mine]), strict=True):
                    assert error(x, y) < 1e-13, (mode, reduction, chosen, error(x, y))


def large_logits_in_one_shard(rank: int) -> None:
    hidden, weight, targets = torch.tensor([[1e4, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([1])
    loss = linear_cross_entropy(hidden, weight[rank : rank + 1], targets, group=dist.group.WORLD)
    assert loss == 2e4
    for target, group in ((2, dist.group.WORLD), (-1, dist.group.WORLD)):
        with pytest.raises(ValueError, match="within the vocabulary"):
            linear_cross_entropy(hidden, weight[rank : rank + 1], torch.tensor([target]), group=group)


class Model(nn.Module):
    """A head that shares the weight of the embedding, or has its own."""

    def __init__(self, tied: bool, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = LinearCrossEntropy(WIDTH, VOCABULARY, weight=self.embedding.weight if tied else None, mode=mode)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)), targets)


def fully_sharded(rank: int) -> None:
    targets = inputs()[2]
    tokens, mine = torch.arange(ROWS) % VOCABULARY, slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    for mode, tied, precision in itertools.product(("slab", "recompute"), (False, True), (torch.float32, torch.bfloat16)):
        exact, whole = Model(tied, mode).double(), Model(tied, mode).to(precision)
        for model in (exact, whole):
            model(tokens, targets).backward()
        sharded, mesh = Model(tied, mode), init_device_mesh("cpu", (RANKS,))
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
        for module in (sharded.body, *([] if tied else [sharded.head]), sharded):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        assert sharded.head.weight.to_local().shape == (VOCABULARY // RANKS, WIDTH)
        loss = sharded(tokens[mine], targets[mine])
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        allowed = 2 * max(error(whole(tokens, targets), exact(tokens, targets)), 1e-6 * total)
        assert error(total, exact(tokens, targets)) <= allowed
        for (name, parameter), same, right in zip(
            sharded.named_parameters(), whole.parameters(), exact.parameters(), strict=True
        ):
            gradient = parameter.grad.full_tensor() * RANKS  # FSDP takes the mean
            assert error(gradient, right.grad) <= 2 * error(same.grad, right.grad), (mode, tied, precision, name)


def checks(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    sharded_vocabulary(rank)
    large_logits_in_one_shard(rank)
    fully_sharded(rank)
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    """With the vocabulary sharded over them, and in FSDP2; one start of the processes for all, since it takes seconds."""
    multiprocessing.spawn(checks, (str(tmp_path / "store"),), nprocs=RANKS)
