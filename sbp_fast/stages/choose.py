"""The stage `choose`: of several recipes of one arm, the one whose model predicts the validation documents best."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbp_fast.config import RunConfig
from sbp_fast.errors import UserError
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage


def choose(
    config: RunConfig,
    out: Path,
    *,
    arm: str,
    models: Mapping[str, Path],
    console: Console,
    force: bool = False,
) -> Manifest:
    """Make the output of `train` with the lowest held-out loss the output of this stage, without a copy where links work.

    Args:
        config: of the run.
        out: directory of the output.
        arm: name of the arm, whose recipes are chosen among.
        models: name -> output of `train`, in the order of `ArmConfig.recipes`.
        console: for progress.
        force: replace an output that was made from other settings or inputs.

    Raises:
        UserError: a model without a held-out loss, or with one of other validation tokens than the first; another number of
            models than the arm has recipes.
    """
    recipes = config.arms[arm].recipes()
    if len(recipes) != len(models):
        raise UserError(
            f"arm {arm}", f"has {len(recipes)} recipes, and {len(models)} models were given", "give one of each recipe"
        )

    def body(context: StageContext) -> None:
        manifests = {name: Manifest.load(directory, "train", hashed=False) for name, directory in models.items()}
        losses = {name: _validation_loss(models[name], manifest) for name, manifest in manifests.items()}
        _require_the_same_tokens(models, manifests)
        best = min(losses, key=lambda name: losses[name])  # the first of equal ones
        recipe = recipes[list(models).index(best)]
        for file in manifests[best].files:
            _link(models[best] / file, context.directory / file)
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        context.console.say(f"held-out loss: {shown}; chosen: {_describe(recipe)}")
        context.device = manifests[best].device
        tried = [{"recipe": tried, "validation_loss": loss} for tried, loss in zip(recipes, losses.values(), strict=True)]
        context.record(
            **manifests[best].counts, choice={"recipe": recipe, "tried": tried, "training_flops": manifests[best].flops}
        )

    return run_stage(
        "choose",
        out,
        config={"recipes": recipes},
        inputs=dict(models),
        body=body,
        console=console,
        force=force,
    )


def _validation_loss(directory: Path, manifest: Manifest) -> float:
    loss = manifest.counts.get("validation_loss")
    if loss is None:
        raise UserError(directory, "has no held-out loss to choose by", "train with validation.points of 1 or more")
    return float(loss)


def _require_the_same_tokens(models: Mapping[str, Path], manifests: Mapping[str, Manifest]) -> None:
    """Refuse losses that were measured on other text: what is measured makes no model stale."""
    measured = {name: manifest.counts["validation_tokens"] for name, manifest in manifests.items()}
    first, tokens = next(iter(measured.items()))
    for name, other in measured.items():
        if other != tokens:
            problem = f"its held-out loss is of {other} validation tokens, that of {first} of {tokens}"
            raise UserError(models[name], problem, "train both with the same [validation]: remove one and run again")


def _describe(recipe: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in recipe.items())


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
