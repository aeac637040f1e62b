"""Settings of training and of the model: renamed keys."""

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
        load_config(["demo"], [f"{old}=1"])
