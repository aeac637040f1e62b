"""Configuration: composition, overrides, refusals, and the way back to TOML."""

from pathlib import Path

import pytest

from sbp_fast.config import RunConfig
from sbp_fast.config.files import diff_config, dump_config, find_config, load_config
from sbp_fast.errors import UserError

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.toml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_later_files_override_earlier_ones_and_overrides_both(tmp_path: Path) -> None:
    first = write(tmp_path / "a.toml", "name = 'a'\n[model]\nlayers = 2\nhidden_size = 64")
    second = write(tmp_path / "b.toml", "[model]\nlayers = 3")
    config = load_config([first, second], ["model.heads=8", "corpus.path=some/file.jsonl", "pair.similarity_low=0.5"])
    assert (config.name, config.model.layers, config.model.hidden_size, config.model.heads) == ("a", 3, 64, 8)
    assert config.corpus.path == "some/file.jsonl"
    assert config.pair.similarity_low == 0.5


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_load_by_name_and_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config([name])
    assert config.name == name
    assert load_config([write(tmp_path / "again.toml", dump_config(config))]) == config


@pytest.mark.parametrize(
    "overrides",
    [
        ["arms.sbp.share=[0.35, 0.9]"],
        ["arms.sbp.share=[0.35, 0.9]", "arms.sbp.label=Mine", "arms.other.synthetic=related", "arms.other.share=[0.1, 0.2]"],
        ["arms.oracle.enabled=false", "arms.baseline.recipe.weight_decay=[0.1, 1]", "seeds=[0, 1]"],
    ],
)
def test_what_a_run_writes_of_its_configuration_is_the_configuration(overrides: list[str], tmp_path: Path) -> None:
    config = load_config(["small"], overrides)
    assert load_config([write(tmp_path / "again.toml", dump_config(config))]) == config


def test_default_arm_that_lists_shares_is_not_trained_itself() -> None:
    config = load_config(["small"], ["arms.sbp.share=[0.35, 0.9]"])
    assert list(config.enabled_arms) == ["baseline", "sbp-share-35", "sbp-share-90", "oracle"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layerz=2", "unknown key model.layerz; did you mean model.layers?"),
        ("modle.layers=2", "unknown key modle; did you mean model?"),
        ("model.layers=none", "model.layers = none is not usable"),
        ("model.layers=0", "greater than or equal to 1"),
        ("model.layers", "not an override"),
        ("model.kv_heads=3", "model: heads = 4 is no multiple of kv_heads = 3"),
        ("model.head_dim=7", "model: head_dim = 7 is odd"),
        ("model=3", "model = 3 is not usable"),
    ],
)
def test_wrong_setting_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(["small"], [override])
    assert message.lower() in str(caught.value).lower()
    assert "\n" not in str(caught.value)


def test_missing_or_malformed_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such configuration.*demo"):
        find_config(tmp_path / "none.toml")
    with pytest.raises(UserError, match=r"did you mean demo\?"):
        find_config("dmo")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config([write(tmp_path / "bad.toml", "[model\nlayers = 2")])


def test_assigning_to_a_configuration_raises() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().name = "other"  # type: ignore[misc]


def test_diff_names_each_changed_leaf() -> None:
    old = RunConfig().model_dump(mode="json")
    new = load_config(["small"], ["pretrain.tokens=500_000", "name=run"]).model_dump(mode="json")
    assert "pretrain.tokens: 1000000 -> 500000" in diff_config(old, new)
    assert diff_config(old, old) == []


def test_renamed_key_is_refused_with_the_new_name(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text("[evaluate]\njudged_documents = 3\n")
    with pytest.raises(UserError, match=r"evaluate.judged_documents has a new name; write it as quality.judged_documents"):
        load_config([tmp_path / "old.toml"])


def test_removed_key_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"compare.bootstrap_samples is no longer a setting; remove it"):
        load_config(["small"], ["compare.bootstrap_samples=5"])


def test_settings_omit_the_fields_without_effect() -> None:
    section = RunConfig().filter
    assert section.settings().keys() == type(section).model_fields.keys() - {"memory_gib"}
