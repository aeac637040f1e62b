"""Settings of training and of the model: renamed keys."""

from pathlib import Path

import pytest

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.config.renamed import RENAMED
from sbp_fast.errors import UserError

TRAINING_KEYS = [old for old in RENAMED if old.startswith(("model.", "pretrain.", "synthesizer."))]


@pytest.mark.parametrize("old", TRAINING_KEYS)
def test_renamed_key_of_training_is_refused_with_an_existing_new_key(old: str) -> None:
    section, name = RENAMED[old].split(".")
    assert name in type(getattr(RunConfig(), section)).model_fields
    with pytest.raises(UserError, match=f"{old} has a new name; write it as {RENAMED[old]}"):
        load_config(["small"], [f"{old}=1"])


def test_patience_without_selection_and_selection_without_points_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").touch()

    def load(*overrides: str) -> RunConfig:
        return load_config([tmp_path / "empty.toml"], list(overrides))

    with pytest.raises(UserError, match='patience = 3 needs select = "best"'):
        load("pretrain.patience=3")
    assert load("pretrain={select='best', patience=3}").pretrain.patience == 3
    for name in ("pretrain", "synthesizer", "arms.sbp.recipe"):
        with pytest.raises(UserError, match=r'select = "best" needs validation\.points'):
            load(f"{name}.select='best'", "validation.points=0")
