from pathlib import Path

import pytest

from sbp_fast.config import ModelConfig
from sbp_fast.errors import UserError
from sbp_fast.model.saved import load_model, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.files import read_json, write_json

CONFIG = ModelConfig(layers=1, hidden_size=16, heads=2, kv_heads=1, head_dim=8, intermediate_size=24)


def test_model_description_of_an_old_format_is_refused_in_one_line(tmp_path: Path) -> None:
    model = Transformer(CONFIG, 20)
    model.initialize(0)
    save_model(model, tmp_path)
    assert load_model(tmp_path).config == CONFIG
    description = read_json(tmp_path / "model.json")
    old_shape = {"layers": 1, "width": 16, "heads": 2, "head_width": 8}  # names of format 1
    write_json(tmp_path / "model.json", {**description, "format": 1, "model": old_shape})
    with pytest.raises(UserError, match=r"model\.json: format 1 is not 2.*train or import the model again"):
        load_model(tmp_path)
