"""The bench itself: it refuses to show a speed for what is wrong, and its streams are what they say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sbp_kernels.layout.reference import dense_mask
from sbp_kernels.nearest import triton as nearest_kernels

from bench import machine, plot, runner
from bench.attention import Stream
from bench.attention import _case as attention_case
from bench.case import Case, Prepared, Tensors
from bench.loss import _case as loss_case
from bench.mixes import MIXES, documents, shared_seeds
from bench.nearest import _case as nearest_case
from bench.pairs import clustered
from bench.readme import kernel_table


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "limits", lambda: {"flops": 1e11, "bytes": 1e10})
    monkeypatch.setattr(runner, "ROUNDS", 5)


def made(error: float, *, peer: Callable[[Tensors], Prepared] | None = None) -> Case:
    def off_by(distance: float) -> Callable[[Tensors], Prepared]:
        return lambda given: Prepared(lambda: {"out": given["x"] + distance})

    providers = {"ours": off_by(error), "plain": off_by(1e-3)} | ({"peer": peer} if peer else {})
    exact = lambda given: {"out": given["x"].double()}  # noqa: E731
    inputs = lambda generator: {"x": torch.randn(100, generator=generator)}  # noqa: E731
    return Case({"size": 100}, inputs, providers, exact, work=100, unit="numbers", flops=1e6, judges=("plain",))


def test_no_speed_is_shown_for_what_is_wrong() -> None:
    right, wrong = runner.measure(made(1.9e-3)), runner.measure(made(2.1e-3))
    assert right["check"]["right"] and set(right["seconds"]) == {"ours", "plain"} and right["rounds"] == 5
    assert not wrong["check"]["right"] and "seconds" not in wrong
    assert wrong["check"]["errors"]["ours"]["out"] == pytest.approx(2.1e-3, rel=1e-3)


def test_a_peer_that_cannot_run_or_disagrees_is_listed_with_its_reason() -> None:
    def absent(given: Tensors) -> Prepared:
        raise ImportError("No module named 'peer'")

    other = lambda given: Prepared(lambda: {"out": 2 * given["x"]})  # noqa: E731
    assert runner.measure(made(1e-3, peer=absent))["left_out"] == {"peer": "No module named 'peer'"}
    row = runner.measure(made(1e-3, peer=other))
    assert row["left_out"]["peer"].startswith("differs from ours by") and set(row["seconds"]) == {"ours", "plain"}


def test_a_long_case_runs_few_times_unwarmed_and_is_judged_by_its_providers() -> None:
    runs, facts = [], {}

    def counted(given: Tensors) -> Prepared:
        facts["found"] = 0.99
        return Prepared(lambda: runs.append(1))

    def poor(given: Tensors) -> Prepared:
        raise ValueError("finds 0.9 of the pairs at most")

    inputs = lambda generator: {"x": torch.zeros(1)}  # noqa: E731
    providers = {"ours": counted, "poor": poor}
    row = runner.measure(Case({"size": 1}, inputs, providers, None, work=1, unit="pairs", facts=facts, long=True))
    assert len(runs) == row["rounds"] == 3 and row["facts"] == {"found": 0.99}
    assert row["left_out"] == {"poor": "finds 0.9 of the pairs at most"} and set(row["seconds"]) == {"ours"}


@pytest.mark.parametrize("mix", [*MIXES, "dense"])
def test_documents_fill_the_stream(mix: str) -> None:
    lengths, parents = documents(mix, 5000)
    assert sum(lengths) == 5000 and min(lengths) > 0 and set(parents) == {-1}


@pytest.mark.parametrize("partners", [1, 3, 16])
def test_a_repeated_seed_sees_what_the_shared_one_does(partners: int) -> None:
    forest = shared_seeds(partners, 150)
    stream = Stream.of(forest)
    assert sum(forest[0]) == 150 and len(stream.repeated) == len(stream.index) >= 150
    mask, repeated = dense_mask(stream.layout), dense_mask(stream.repeated)
    assert torch.equal(stream.index[stream.scored_repeated], stream.scored)
    for row, original in zip(stream.scored_repeated.tolist(), stream.scored.tolist(), strict=True):
        assert sorted(stream.index[repeated[row]].tolist()) == mask[original].nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("kind", ["forward", "backward", "both"])
@pytest.mark.parametrize("name", ["256 to 2048", "2 partners a seed"])
def test_every_provider_of_attention_gives_the_same(name: str, kind: str) -> None:
    forest = shared_seeds(2, 120) if "partners" in name else documents(name, 120)
    row = runner.measure(attention_case(name, forest, (4, 2, 16), kind, 0))
    assert row["check"]["right"] and "one operation, dense mask" in row["seconds"]
    assert set(row["check"]["errors"]["ours"]) == ({"out"} if kind == "forward" else {"out", "dq", "dk", "dv"})


def test_every_provider_of_the_loss_gives_the_same() -> None:
    row = runner.measure(loss_case(60, 16, 50, 0.5, 0))
    assert row["check"]["right"] and {"ours, slab", "ours, recompute", "full logits"} <= set(row["seconds"])


@pytest.mark.parametrize("probes", [0, 2])
def test_every_provider_of_nearest_members_gives_the_same(probes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options, small = nearest_kernels.block_options, {"BLOCK_Q": 16, "BLOCK_M": 16, "BLOCK_D": 128, "ROOM": 16, "ROWS": 2}
    monkeypatch.setattr(nearest_kernels, "block_options", lambda *given: options(*given) | small)
    found = runner.check(nearest_case(clustered, 40, probes=probes, checked=40, k=2))
    assert found["right"] and found["errors"].keys() >= {"ours", "torch, a bucket at a time"}
    for errors in found["errors"].values():
        assert max(errors.values(), default=0.0) < 1e-6


def test_charts_and_table_come_from_the_record_alone(tmp_path: Path) -> None:
    record = {"operation": "loss", "environment": {"device": "a device"}, "cases": [runner.measure(made(1e-3))]}
    assert plot.draw_ratios(record) is not None and plot.draw_roofline(record) is not None
    assert plot.draw_ratios({**record, "cases": [runner.measure(made(1.0))]}) is None
    (tmp_path / "a-device").mkdir()
    (tmp_path / "a-device" / "loss.json").write_text(json.dumps(record))
    table = kernel_table(tmp_path)
    assert "| a device | loss | size 100 |" in table and "| any GPU | all | | not measured | | |" in table
