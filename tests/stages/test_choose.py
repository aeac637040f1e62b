from pathlib import Path

import pytest
from tiny_training import QUIET

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.stage import StageContext, run_stage
from sbp_fast.stages.choose import choose


@pytest.fixture
def config() -> RunConfig:
    return load_config(["small"], ["arms.tuned.recipe.weight_decay=[0.1, 1.0, 4.0]"])


def make_model(directory: Path, loss: float | None, validation_tokens: int = 500) -> Path:
    """Write what stands for the output of `train`, with a held-out loss."""

    def body(context: StageContext) -> None:
        (context.directory / "weights").write_text(f"weights of loss {loss}")
        context.flops = 7.0
        losses = {} if loss is None else {"validation_loss": loss, "validation_tokens": validation_tokens}
        context.record(**losses, tokens=1000)

    run_stage("train", directory, config={"loss": loss}, inputs={}, body=body, console=QUIET)
    return directory


def make_models(directory: Path, losses: list[float | None]) -> dict[str, Path]:
    return {f"model-{number}": make_model(directory / f"model-{number}", loss) for number, loss in enumerate(losses)}


def test_the_model_of_the_lowest_loss_is_the_output_with_its_counts(config: RunConfig, tmp_path: Path) -> None:
    models = make_models(tmp_path, [3.0, 2.0, 2.5])
    manifest = choose(config, tmp_path / "choose", arm="tuned", models=models, console=QUIET)
    assert (tmp_path / "choose" / "weights").read_text() == "weights of loss 2.0"
    assert manifest.counts["tokens"] == 1000 and manifest.flops == 0
    assert manifest.counts["choice"] == {
        "recipe": {"weight_decay": 1.0},
        "tried": [
            {"recipe": {"weight_decay": decay}, "validation_loss": loss}
            for decay, loss in zip((0.1, 1.0, 4.0), (3.0, 2.0, 2.5), strict=True)
        ],
        "training_flops": 7.0,
    }
    Manifest.load(models["model-1"])  # the chosen model is still whole where it was trained


def test_of_equal_losses_the_first_recipe_is_chosen(config: RunConfig, tmp_path: Path) -> None:
    manifest = choose(config, tmp_path / "choose", arm="tuned", models=make_models(tmp_path, [2.0, 2.0, 2.5]), console=QUIET)
    assert manifest.counts["choice"]["recipe"] == {"weight_decay": 0.1}


def test_a_model_without_a_held_out_loss_is_refused_by_name(config: RunConfig, tmp_path: Path) -> None:
    models = make_models(tmp_path, [2.0, None, 2.5])
    with pytest.raises(UserError, match="model-1: has no held-out loss to choose by"):
        choose(config, tmp_path / "choose", arm="tuned", models=models, console=QUIET)
    assert not (tmp_path / "choose").exists()


def test_another_number_of_models_than_recipes_is_refused(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 3 recipes, and 2 models were given"):
        choose(config, tmp_path / "choose", arm="tuned", models=make_models(tmp_path, [2.0, 3.0]), console=QUIET)


def test_losses_of_other_validation_tokens_are_not_compared(config: RunConfig, tmp_path: Path) -> None:
    models = make_models(tmp_path, [2.0, 3.0]) | {"other": make_model(tmp_path / "other", 1.0, validation_tokens=400)}
    with pytest.raises(UserError, match="other: its held-out loss is of 400 validation tokens, that of model-0 of 500"):
        choose(config, tmp_path / "choose", arm="tuned", models=models, console=QUIET)
