"""The model card of an export: what it says is in the manifests and in the results of the run, and nothing else is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import serving_hub

from sbp_fast.cli import app
from sbp_fast.config.files import dump_config, load_config
from sbp_fast.errors import UserError
from sbp_fast.experiment.model_card import NOT_SCORED, REPLACED, UNFINISHED, model_card
from sbp_fast.experiment.report.wording import headline, number
from sbp_fast.pipeline.files import read_json
from sbp_fast.pipeline.manifest import MANIFEST, Manifest


@pytest.fixture
def copied_run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def fingerprint(run: Path, stage: str) -> str:
    return Manifest.read(run / stage).fingerprint


def test_export_of_an_arm_writes_a_card_with_the_figures_of_its_run_and_the_synthesizers_fingerprint(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(tiny_run / "train/sbp"), "--corpus", str(tiny_run / "prepare"), "--out", str(tmp_path / "out")]
    app(arguments, standalone_mode=False)
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    card, results = (tmp_path / "out" / "README.md").read_text(), json.loads((tiny_run / "results.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n") and "# tiny: train/sbp" in card
    for name, metric in results["metrics"].items():
        if "variant_of" not in metric:
            assert f" {number(results['arms']['sbp'][name]['value'], metric)} " in card
    assert all(sentence in card for sentence in headline(results))
    assert f"| synthesizer | tune/related | {fingerprint(tiny_run, 'tune/related')} |" in card
    assert f"| this model | train/sbp | {fingerprint(tiny_run, 'train/sbp')} |" in card
    assert f"{results['arms']['sbp']['parameters']:,}" in card and f"{results['corpus']['unique_tokens']:,} tokens" in card
    assert str(tiny_run.parent) not in card and str(tmp_path) not in card
    assert read_json(tmp_path / "out" / "config.json")["max_position_embeddings"] == 256


def test_export_pushes_its_files_to_the_hub_and_refuses_a_wrong_name_before_it_writes(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["export", str(tiny_run / "train/sbp"), "--corpus", str(tiny_run / "prepare"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="write it as OWNER/NAME"):
        app([*arguments, "--push-to", "demo"], standalone_mode=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_a-secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with serving_hub("hf_a-secret") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        app([*arguments, "--push-to", "lab/demo-sbp"], standalone_mode=False)
    files = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").iterdir()}
    del files[MANIFEST]
    assert hub.files == files and "README.md" in files and hub.repositories == {"lab/demo-sbp": True}
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "out"), f"{hub.url}/lab/demo-sbp"]


def test_the_card_of_a_synthesizer_says_how_to_prompt_it_and_what_it_learnt(tiny_run: Path) -> None:
    card = model_card(tiny_run / "tune/related", tiny_run / "prepare")
    assert "The synthesizer of the experiment `tiny`" in card and "`tokenizer.partner_token_id`" in card
    assert "a partner that the synthesizer never saw costs" in card or "Not measured" in card
    assert f"| start | train/baseline | {fingerprint(tiny_run, 'train/baseline')} |" in card


def test_the_card_of_a_model_outside_a_run_has_its_training_and_no_results(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "train/sbp", tmp_path / "alone")
    card = model_card(tmp_path / "alone", tiny_run / "prepare")
    assert "The arm `sbp` of an experiment" in card and "## Results" not in card
    assert f"| synthetic |  | {fingerprint(tiny_run, 'filter/related')} |" in card and "tune/related" not in card


def test_the_card_says_why_a_run_has_no_results_of_the_model(copied_run: Path) -> None:
    prepare = copied_run / "prepare"
    replace(Manifest.read(copied_run / "train/sbp"), fingerprint="of another training").write(copied_run / "train/sbp")
    assert REPLACED in model_card(copied_run / "train/sbp", prepare)
    shutil.rmtree(copied_run / "compare")
    assert UNFINISHED in model_card(copied_run / "train/baseline", prepare)
    path = copied_run / "config.toml"
    path.write_text(dump_config(load_config([path], ["arms.baseline.recipe.weight_decay=[0.1, 1.0]"])))
    (copied_run / "train/baseline").rename(copied_run / "train/baseline-weight_decay=1.0")
    assert NOT_SCORED in model_card(copied_run / "train/baseline-weight_decay=1.0", prepare)
