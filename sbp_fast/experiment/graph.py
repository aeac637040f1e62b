"""The stages of an experiment, each declared once: its inputs, its directory, its function and its cost.

A stage's name is also its directory within a run: the command that runs it, and for commands that serve several models the
model ("train/sbp", "evaluate/sbp"). The runner walks the stages in order; the ledger, the plan, the report and results.json
derive from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbp_fast.config import RunConfig
from sbp_fast.experiment import costs
from sbp_fast.experiment.arms import Arm, arms_of
from sbp_fast.experiment.costs import CorpusEstimate, Cost

if TYPE_CHECKING:
    from sbp_fast.pipeline.executors.executor import Workers
    from sbp_fast.pipeline.progress import Console

# The functions that run stages import them when called: the plan reads this graph and must not wait for torch.


@dataclass(frozen=True)
class Step:
    """A stage about to run: its settings, its directories, and how to run it.

    Attributes:
        config: of the run.
        out: directory to write.
        inputs: input name -> directory of the stage that made it.
        console: for progress.
        gpus: processes that train and synthesize on this machine.
        force: replace outputs that were made from other settings or inputs.
        workers: runs the tasks of the data stages.
    """

    config: RunConfig
    out: Path
    inputs: Mapping[str, Path]
    console: Console
    gpus: int
    force: bool
    workers: Workers

    @property
    def options(self) -> dict[str, Any]:
        """Options that every stage function takes."""
        return {"console": self.console, "force": self.force}

    @property
    def arguments(self) -> dict[str, Any]:
        """Input directories, and the options that every stage function takes."""
        return {**self.inputs, **self.options}


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: see the module's docstring.
        inputs: input name -> name of the stage that makes it.
        run: function that runs the stage.
        cost: function that computes its cost from the configuration and an estimate of the corpus.
        arm: the arm that it trains or evaluates; "" for stages that arms share.
    """

    name: str
    inputs: dict[str, str]
    run: Callable[[Step], Any]
    cost: Callable[[RunConfig, CorpusEstimate], Cost]
    arm: str = ""


PREPARE, EMBED, PAIR, SYNTHESIZE, FILTER, QUALITY, COMPARE = (
    "prepare", "embed", "pair", "synthesize", "filter", "quality", "compare",
)  # fmt: skip
SYNTHESIZER = "train/synthesizer"
RELATION = "relation"


def train_stage(run: str) -> str:
    """Return the name of the stage that makes a training run."""
    return f"train/{run}"


def evaluate_stage(run: str) -> str:
    """Return the name of the stage that scores the model of a training run."""
    return f"evaluate/{run}"


def stages_of(config: RunConfig) -> dict[str, Stage]:
    """Return every stage of a run by name, each after the stages that make its inputs."""
    arms = arms_of(config)
    baseline = arms[config.baseline]
    stages = [Stage(PREPARE, {}, _prepare, costs.prepare), *_train(baseline)]
    if any(arm.settings.synthetic for arm in arms.values()):
        stages += _synthesis(train_stage(baseline.name))
    for arm in arms.values():
        stages += [] if arm is baseline else _train(arm)
    for arm in arms.values():
        stages += [
            Stage(evaluate_stage(run), {"corpus": PREPARE, "model": train_stage(run)}, _evaluate, costs.evaluate, arm.name)
            for run in arm.runs
        ]
    scores = {run: evaluate_stage(run) for arm in arms.values() for run in arm.runs}
    stages.append(Stage(COMPARE, scores, _compare, costs.compare))
    return {stage.name: stage for stage in stages}


def needed_stages(stages: Mapping[str, Stage], name: str) -> set[str]:
    """Return the names of a stage and of all stages that it needs, directly or not."""
    needed, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current not in needed:
            needed.add(current)
            waiting += stages[current].inputs.values()
    return needed


def _synthesis(start: str) -> list[Stage]:
    """Return the stages from related pairs to filtered synthetic documents."""
    corpus = {"corpus": PREPARE}
    return [
        Stage(EMBED, corpus, _embed, costs.embed),
        Stage(PAIR, corpus | {"vectors": EMBED}, _pair, costs.pair),
        Stage(SYNTHESIZER, corpus | {"pairs": PAIR, "start": start}, _tune, costs.synthesizer),
        Stage(SYNTHESIZE, corpus | {"model": SYNTHESIZER}, _synthesize, costs.synthesize),
        Stage(FILTER, corpus | {"synthetic": SYNTHESIZE}, _filter, costs.filter_documents),
        Stage(QUALITY, corpus | {"synthetic": SYNTHESIZE, "filtered": FILTER, "pairs": PAIR}, _quality, costs.quality),
        Stage(RELATION, corpus | {"pairs": PAIR, "model": SYNTHESIZER}, _relation, costs.relation),
    ]


def _train(arm: Arm) -> list[Stage]:
    inputs = {"corpus": PREPARE} | ({"synthetic": FILTER} if arm.settings.synthetic else {})

    def cost(config: RunConfig, corpus: CorpusEstimate) -> Cost:
        return costs.pretraining(config, corpus, arm.settings.resolve_recipe(config.pretrain))

    def run_with(seed: int) -> Callable[[Step], Any]:
        def run(step: Step) -> Any:
            from sbp_fast.train.task import TrainTask

            return _run_training(step, TrainTask.of_arm(step.config, arm.name, seed))

        return run

    return [Stage(train_stage(run), inputs, run_with(seed), cost, arm.name) for run, seed in arm.runs.items()]


def _prepare(step: Step) -> Any:
    from sbp_fast.stages.prepare import prepare

    return prepare(step.config, step.out, workers=step.workers, **step.options)


def _embed(step: Step) -> Any:
    from sbp_fast.stages.embed import embed

    return embed(step.config, step.inputs["corpus"], step.out, workers=step.workers, **step.options)


def _pair(step: Step) -> Any:
    from sbp_fast.stages.pair import pair

    corpus, vectors = step.inputs["corpus"], step.inputs["vectors"]
    return pair(step.config, corpus, vectors, step.out, workers=step.workers, **step.options)


def _tune(step: Step) -> Any:
    from sbp_fast.train.task import TrainTask

    return _run_training(step, TrainTask.of_synthesizer(step.config))


def _run_training(step: Step, task: Any) -> Any:
    from sbp_fast.pipeline.distributed import run_in_processes
    from sbp_fast.stages.train import train

    return run_in_processes(train, step.config, task, step.out, gpus=step.gpus, **step.arguments)


def _synthesize(step: Step) -> Any:
    from sbp_fast.pipeline.distributed import run_in_processes
    from sbp_fast.stages.synthesize import synthesize

    if not step.workers.local:
        return synthesize(step.config, step.out, workers=step.workers, **step.arguments)
    return run_in_processes(synthesize, step.config, step.out, gpus=step.gpus, **step.arguments)


def _filter(step: Step) -> Any:
    from sbp_fast.stages.filter import filter_documents

    return filter_documents(step.config, step.out, workers=step.workers, **step.arguments)


def _quality(step: Step) -> Any:
    from sbp_fast.stages.quality import measure_quality

    return measure_quality(step.config, step.out, **step.arguments)


def _relation(step: Step) -> Any:
    from sbp_fast.stages.relation import measure_relation

    return measure_relation(step.config, step.out, **step.arguments)


def _evaluate(step: Step) -> Any:
    from sbp_fast.stages.evaluate import evaluate

    return evaluate(step.config, step.out, **step.arguments)


def _compare(step: Step) -> Any:
    from sbp_fast.stages.compare import compare

    scores = {arm.name: [step.inputs[run] for run in arm.runs] for arm in arms_of(step.config).values()}
    return compare(step.config, step.out, scores=scores, **step.options)
