"""Benchmarks of operations: their packed sequences, and the agreement of all providers on small shapes."""

import pytest
import torch
from sbp_kernels import nearest_kernels
from sbp_kernels.reference import dense_mask

from bench import machine, runner
from bench.attention import PackedSequence
from bench.attention import _case as attention_case
from bench.length_distributions import LENGTH_DISTRIBUTIONS, documents, shared_seeds
from bench.loss import _case as loss_case
from bench.nearest import _case as nearest_case
from bench.pairs import clustered


@pytest.fixture(autouse=True)
def fixed_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "roofline", lambda: {"flops": 1e11, "bytes": 1e10})


@pytest.mark.parametrize("distribution", [*LENGTH_DISTRIBUTIONS, "dense"])
def test_documents_of_a_distribution_fill_the_tokens(distribution: str) -> None:
    lengths, parents = documents(distribution, 5000)
    assert sum(lengths) == 5000 and min(lengths) > 0 and set(parents) == {-1}


@pytest.mark.parametrize("partners", [1, 3, 16])
def test_packed_sequence_with_repeated_seeds_has_the_mask_of_the_shared_ones(partners: int) -> None:
    tree = shared_seeds(partners, 150)
    sequence = PackedSequence.of(tree)
    assert sum(tree[0]) == 150 and len(sequence.repeated) == len(sequence.index) >= 150
    mask, repeated = dense_mask(sequence.layout), dense_mask(sequence.repeated)
    assert torch.equal(sequence.index[sequence.scored_repeated], sequence.scored)
    for row, original in zip(sequence.scored_repeated.tolist(), sequence.scored.tolist(), strict=True):
        assert sorted(sequence.index[repeated[row]].tolist()) == mask[original].nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("kind", ["forward", "backward", "both"])
@pytest.mark.parametrize("name", ["256 to 2048", "2 partners a seed"])
def test_attention_providers_agree(name: str, kind: str) -> None:
    tree = shared_seeds(2, 120) if "partners" in name else documents(name, 120)
    row = runner.measure(attention_case(name, tree, (4, 2, 16), kind), seconds=0)
    assert row["check"]["right"] and "one operation, dense mask" in row["seconds"]
    assert set(row["check"]["errors"]["ours"]) == ({"out"} if kind == "forward" else {"out", "dq", "dk", "dv"})


def test_loss_providers_agree() -> None:
    row = runner.measure(loss_case(60, 16, 50, 0.5), seconds=0)
    assert row["check"]["right"] and {"ours, slab", "ours, recompute", "full logits"} <= set(row["seconds"])


@pytest.mark.parametrize("probes", [0, 2])
def test_nearest_providers_agree(probes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options, small = nearest_kernels.block_options, {"BLOCK_Q": 16, "BLOCK_M": 16, "BLOCK_D": 128, "ROOM": 16, "ROWS": 2}
    monkeypatch.setattr(nearest_kernels, "block_options", lambda *arguments: options(*arguments) | small)
    check = runner.check(nearest_case(clustered, 40, probes=probes, checked=40, k=2))
    assert check["right"] and check["errors"].keys() >= {"ours", "torch, a partition at a time"}
    for errors in check["errors"].values():
        assert max(errors.values(), default=0.0) < 1e-6
