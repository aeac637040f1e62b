"""Checkpoints made to run code when they are loaded."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sbp_fast.errors import UserError
from sbp_fast.train.checkpoint_reader import CheckpointPlanner, CheckpointReader, cause_of_failure


class TouchesAFile:
    """A value whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def load(state: dict[str, object], checkpoint: Path) -> None:
    with cause_of_failure():
        dcp.load(state, storage_reader=CheckpointReader(checkpoint), planner=CheckpointPlanner(), no_dist=True)


def test_tensors_and_plain_values_come_back(tmp_path: Path) -> None:
    values = {"rate": 1e-3, "betas": (0.9, 0.95), "names": ["a", "b"], "fused": None, "state": {"weight": torch.arange(4.0)}}
    dcp.save(dict(values), checkpoint_id=tmp_path / "saved", no_dist=True)
    state = {"rate": 0.0, "betas": (), "names": [], "fused": True, "state": {"weight": torch.zeros(4)}}
    load(state, tmp_path / "saved")
    weights = state.pop("state")["weight"], values.pop("state")["weight"]  # type: ignore[index,call-overload]
    assert state == values and torch.equal(*weights)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_description_that_would_run_code_is_refused_and_runs_none(protocol: int, tmp_path: Path) -> None:
    dcp.save({"weight": torch.zeros(4)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    (tmp_path / "saved/.metadata").write_bytes(pickle.dumps(TouchesAFile(tmp_path / "ran"), protocol))
    with pytest.raises(UserError, match=r"\.metadata: is not the description of a checkpoint: it asks for"):
        load({"weight": torch.zeros(4)}, tmp_path / "saved")
    assert not (tmp_path / "ran").exists()


def test_value_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    dcp.save({"rate": TouchesAFile(tmp_path / "ran")}, checkpoint_id=tmp_path / "saved", no_dist=True)
    with pytest.raises(UserError, match="rate of a checkpoint: is not a plain value"):
        load({"rate": 0.0}, tmp_path / "saved")
    assert not (tmp_path / "ran").exists()


def test_description_cut_short_is_refused(tmp_path: Path) -> None:
    dcp.save({"weight": torch.zeros(4)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    description = (tmp_path / "saved/.metadata").read_bytes()
    (tmp_path / "saved/.metadata").write_bytes(description[: len(description) // 2])
    with pytest.raises(UserError, match="is not the description of a checkpoint"):
        load({"weight": torch.zeros(4)}, tmp_path / "saved")
