from pathlib import Path

import pytest
import torch
from recording_console import RecordingConsole

from sbp_fast.config import CheckpointConfig, ModelConfig, TrainConfig
from sbp_fast.errors import UserError
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.distributed import Processes
from sbp_fast.pipeline.files import read_json
from sbp_fast.pipeline.seals import fingerprint_file
from sbp_fast.train.checkpoint import MARKER, Checkpoints
from sbp_fast.train.optimizer import Optimizers, make_optimizers

SINGLE_PROCESS = Processes(0, 1, torch.device("cpu"))
SHAPE = ModelConfig(layers=1, hidden_size=16, heads=2, kv_heads=1, head_dim=8, intermediate_size=24)


def trained(steps: int, optimizer: str = "muon") -> tuple[Transformer, Optimizers]:
    model = Transformer(SHAPE, 20)
    model.initialize(0)
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer))
    for step in range(steps):
        learn(model, optimizers, step)
    return model, optimizers


def learn(model: Transformer, optimizers: Optimizers, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


def state(model: Transformer, optimizers: Optimizers) -> list[torch.Tensor]:
    moments = [value for o in optimizers for s in o.state.values() for value in s.values()]
    return [torch.clone(value.detach()) for value in [*model.parameters(), *moments]]


def make(directory: Path, **settings: int) -> Checkpoints:
    return Checkpoints(directory, CheckpointConfig(**settings), SINGLE_PROCESS, RecordingConsole())


def steps_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loaded_state_is_the_saved_one_and_not_a_later_one(tmp_path: Path, optimizer: str) -> None:
    model, optimizers = trained(3, optimizer)
    saved, random = state(model, optimizers), torch.get_rng_state()
    checkpoints = make(tmp_path)
    stalled = checkpoints.save(3, model, optimizers, {"tokens": 5}, 3)
    learn(model, optimizers, 3)  # while it is written
    checkpoints.wait()
    torch.rand(1)
    assert stalled > 0 and read_json(tmp_path / "step-00000003" / MARKER)["totals"] == {"tokens": 5}
    fresh = trained(0, optimizer)
    newest = make(tmp_path).newest()
    assert newest is not None and newest[1]["step"] == 3
    make(tmp_path).load(newest[0], *fresh)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(state(*fresh), saved, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    learn(*fresh, 3)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(state(*fresh), state(model, optimizers), strict=True))


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "missing", "metadata", "marker"])
def test_damaged_checkpoint_is_named_and_the_one_before_loaded(tmp_path: Path, damage: str) -> None:
    checkpoints = make(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, *trained(step), {}, step)
    checkpoints.wait()
    shard = tmp_path / "step-00000002" / {"metadata": ".metadata", "marker": MARKER}.get(damage, "__0_0.distcp")
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    else:
        content[len(content) // 2] ^= 1
        shard.write_bytes(content[:-1] if damage == "truncated" else content)
    again = make(tmp_path)
    newest = again.newest()
    assert newest is not None and newest[1]["step"] == 1
    assert again.console.lines == [f"checkpoint step-00000002 is damaged ({shard.name}): going back to the one before"]
    assert steps_in(tmp_path) == ["step-00000001"]
    assert make(tmp_path / "none").newest() is None


def test_checkpoint_whose_log_was_changed_is_damaged_and_one_whose_log_grew_is_not(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 0}\n')
    checkpoints = make(tmp_path / "checkpoints")
    checkpoints.save(1, *trained(1), {}, 1, {log.name: fingerprint_file(log)})
    checkpoints.wait()
    log.write_text('{"step": 0}\n{"step": 1}\n')
    assert make(tmp_path / "checkpoints").newest() is not None
    log.write_text('{"step": 9}\n{"step": 1}\n')
    again = make(tmp_path / "checkpoints")
    assert again.newest() is None and "metrics.jsonl" in again.console.lines[0]


def test_unfinished_checkpoint_is_ignored_and_rewritten(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, *trained(step), {}, step)
    checkpoints.wait()
    (tmp_path / "step-00000002" / MARKER).unlink()
    again = make(tmp_path)
    newest = again.newest()
    assert newest is not None and newest[1]["step"] == 1 and not again.console.lines
    again.save(2, *trained(2), {}, 2)
    again.wait()
    newest = again.newest()
    assert newest is not None and newest[1]["step"] == 2


def test_newest_checkpoints_and_every_nth_stay(tmp_path: Path) -> None:
    with make(tmp_path / "during", keep=2, keep_every_steps=3) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, *trained(1), {}, step)
        checkpoints.wait()
        names = [f"step-{step:08d}" for step in (3, 5, 6, 7)]  # 3 and 6 for good, and the newest two of the others
        assert steps_in(tmp_path / "during") == names
        checkpoints.clear(tmp_path / "after")
    assert steps_in(tmp_path / "after") == ["step-00000003", "step-00000006"]
    assert not (tmp_path / "during").exists()


def test_selected_checkpoint_stays_as_long_as_one_that_selects_it(tmp_path: Path) -> None:
    checkpoints, left = make(tmp_path, keep=2), []
    for step, selected in enumerate((1, 1, 1, 4, 4, 4), start=1):
        checkpoints.save(step, *trained(1), {}, selected)
        checkpoints.wait()
        left.append([int(name[-1]) for name in steps_in(tmp_path)])
    assert left == [[1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5], [4, 5, 6]]
    assert checkpoints.find(4) == tmp_path / "step-00000004"
    (tmp_path / "step-00000004" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match="step-00000004: the checkpoint of the selected weights is missing or damaged"):
        checkpoints.find(4)


def test_failed_save_raises(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    checkpoints.save(1, *trained(1), {}, 1)
    (tmp_path / "step-00000002").touch()  # a file where the directory should be
    with pytest.raises(FileExistsError, match="step-00000002"):
        checkpoints.save(2, *trained(1), {}, 2)
        checkpoints.wait()
