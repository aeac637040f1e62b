"""How each stage of the graph is run: its directories and options handed to the function of the stage.

The functions import stages when called: the plan reads the graph and must not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbp_fast.experiment.graph import Step

Run = Callable[["Step"], Any]


def prepare(step: Step) -> Any:
    """Run the stage `prepare`."""
    from sbp_fast.stages.prepare import prepare

    return prepare(step.config, step.out, workers=step.workers, **step.options)


def embed(step: Step) -> Any:
    """Run the stage `embed`."""
    from sbp_fast.stages.embed import embed

    return embed(step.config, step.inputs["corpus"], step.out, workers=step.workers, **step.options)


def pair(step: Step) -> Any:
    """Run the stage `pair`."""
    from sbp_fast.stages.pair import pair

    corpus, vectors = step.inputs["corpus"], step.inputs.get("vectors")
    return pair(step.config, corpus, vectors, step.out, workers=step.workers, **step.options)


def pair_at_random(step: Step) -> Any:
    """Run the stage `pair` for random pairs."""
    from sbp_fast.stages.random_pairs import pair_at_random

    return pair_at_random(step.config, step.out, **step.arguments)


def stitch(step: Step) -> Any:
    """Run the stage `stitch`."""
    from sbp_fast.stages.stitch import stitch

    return stitch(step.config, step.out, **step.arguments)


def train_arm(arm: str, seed: int, recipe: Mapping[str, Any] | None = None) -> Run:
    """Return a function that trains an arm; without a recipe, by its only one or by the one that the input "recipe" chose."""

    def run(step: Step) -> Any:
        from sbp_fast.pipeline.manifest import Manifest
        from sbp_fast.train.task import TrainTask

        inputs, changes = dict(step.inputs), recipe
        if "recipe" in inputs:
            changes = Manifest.load(inputs.pop("recipe"), "choose", hashed=False).counts["choice"]["recipe"]
        return _train(step, TrainTask.of_arm(step.config, arm, seed, changes), inputs)

    return run


def import_model(directory: str) -> Run:
    """Return a function that imports a model pretrained elsewhere, with the context of the arms."""

    def run(step: Step) -> Any:
        from sbp_fast.stages.huggingface import import_hugging_face

        return import_hugging_face(Path(directory), step.out, context=step.config.model.context, **step.options)

    return run


def tune(from_scratch: bool) -> Run:
    """Return a function that tunes a synthesizer."""

    def run(step: Step) -> Any:
        from sbp_fast.train.task import TrainTask

        return _train(step, TrainTask.of_synthesizer(step.config, from_scratch=from_scratch), step.inputs)

    return run


def _train(step: Step, task: Any, inputs: Mapping[str, Any]) -> Any:
    from sbp_fast.pipeline.launcher import run_in_processes
    from sbp_fast.stages.train import train

    return run_in_processes(train, step.config, task, step.out, gpus=step.gpus, **inputs, **step.options)


def choose(arm: str) -> Run:
    """Return a function that chooses among the recipes of an arm."""

    def run(step: Step) -> Any:
        from sbp_fast.stages.choose import choose

        return choose(step.config, step.out, arm=arm, models=step.inputs, **step.options)

    return run


def synthesize(step: Step) -> Any:
    """Run the stage `synthesize`."""
    from sbp_fast.pipeline.launcher import run_in_processes
    from sbp_fast.stages.synthesize import synthesize

    if not step.workers.local:
        return synthesize(step.config, step.out, workers=step.workers, **step.arguments)
    return run_in_processes(synthesize, step.config, step.out, gpus=step.gpus, **step.arguments)


def filter_documents(step: Step) -> Any:
    """Run the stage `filter`."""
    from sbp_fast.stages.filter import filter_documents

    return filter_documents(step.config, step.out, workers=step.workers, **step.arguments)


def quality(step: Step) -> Any:
    """Run the stage `quality`."""
    from sbp_fast.stages.quality import measure_quality

    return measure_quality(step.config, step.out, **step.arguments)


def relation(step: Step) -> Any:
    """Run the stage `relation`."""
    from sbp_fast.stages.relation import measure_relation

    return measure_relation(step.config, step.out, **step.arguments)


def evaluate(step: Step) -> Any:
    """Run the stage `evaluate`."""
    from sbp_fast.stages.evaluate import evaluate

    return evaluate(step.config, step.out, **step.arguments)


def compare(runs: Mapping[str, Sequence[str]]) -> Run:
    """Return a function that compares arms, given the names of each arm's training runs."""

    def run(step: Step) -> Any:
        from sbp_fast.stages.compare import compare

        scores = {arm: [step.inputs[name] for name in names] for arm, names in runs.items()}
        return compare(step.config, step.out, scores=scores, **step.options)

    return run
