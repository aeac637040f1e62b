from pathlib import Path

import pytest

from sbp_fast.config import RunConfig
from sbp_fast.config.describe import describe_config
from sbp_fast.config.files import load_config

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.toml"))
CONTROLS = ["demo", "controls"]


def files(name: str) -> list[str]:
    return CONTROLS if name == "controls" else [name]


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("name", SHIPPED)
def test_described_configuration_is_read_back_as_it_was(name: str, changes: bool, tmp_path: Path) -> None:
    config = load_config(files(name))
    (tmp_path / "described.toml").write_text(describe_config(config, changes=changes))
    assert load_config([tmp_path / "described.toml"]) == config


def test_every_key_with_a_meaning_is_explained_once() -> None:
    text = describe_config(RunConfig())
    meaning = " ".join((RunConfig.model_fields["seed"].description or "").split())
    assert text.count(f"# {meaning[:60]}") == 1
    assert text.count("# Whether the run trains this arm") == 1 and text.count("\nenabled = true") == 3


def test_changes_are_what_differs_from_the_defaults() -> None:
    text = describe_config(load_config(["small"], ["name='mine'", "arms.tuned.recipe.weight_decay=[0.1, 1]"]), changes=True)
    assert 'name = "mine"' in text and "[arms.tuned" in text and "weight_decay = [" in text
    assert "\ndevice" not in text and "[quality]" not in text
    assert describe_config(RunConfig(), changes=True).strip() == ""
