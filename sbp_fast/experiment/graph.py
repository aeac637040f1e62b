"""The stages of an experiment, each declared once: its inputs, its directory, its function and its cost.

A stage's name is also its directory within a run: the command that runs it, and for commands that serve several models or
sources the model or the source ("train/sbp", "evaluate/sbp", "synthesize/related"). The runner walks the stages in order; the
ledger, the plan, the report and results.json derive from them. What several arms need is one stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbp_fast.config import RunConfig
from sbp_fast.errors import UserError
from sbp_fast.experiment import costs, steps
from sbp_fast.experiment.arms import Arm, arms_of
from sbp_fast.experiment.costs import CostFunction
from sbp_fast.experiment.sources import Source, sources_of, stage_config, used_sources
from sbp_fast.pipeline.executors.local import LOCAL

if TYPE_CHECKING:
    from sbp_fast.pipeline.executors.executor import Workers
    from sbp_fast.pipeline.progress import Console

PREPARE, EMBED, COMPARE, STITCHED = "prepare", "embed", "compare", "stitch/unique"
DEFAULT_SOURCE = "related"
"""Source whose pairs order the documents of an arm with `order = "related"`."""


@dataclass(frozen=True)
class Step:
    """A stage about to run: its settings, its directories, and how to run it.

    Attributes:
        config: of the stage (see `Stage.config`).
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
    gpus: int = 1
    force: bool = False
    workers: Workers = LOCAL

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
        config: the run's configuration with the changes of the source that the stage belongs to.
        arm: the arm that it trains or evaluates; "" for stages that arms share.
    """

    name: str
    inputs: dict[str, str]
    run: Callable[[Step], Any]
    cost: CostFunction
    config: RunConfig
    arm: str = ""

    def run_in(self, directory: Path, **options: Any) -> Any:
        """Run the stage in the directory of a run; `options` are further attributes of `Step`."""
        inputs = {name: directory / source for name, source in self.inputs.items()}
        return self.run(Step(self.config, directory / self.name, inputs, **options))


def train_stage(run: str) -> str:
    """Return the name of the stage that makes a training run."""
    return f"train/{run}"


def model_stage(arm: Arm, run: str) -> str:
    """Return the name of the stage whose output is the model of a training run of an arm."""
    return f"choose/{arm.name}" if arm.candidates and run == arm.name else train_stage(run)


def evaluate_stage(run: str) -> str:
    """Return the name of the stage that scores the model of a training run."""
    return f"evaluate/{run}"


def quality_stage(source: Source) -> str:
    """Return the name of the stage that measures the documents of a source."""
    return f"quality/{source.filter.removeprefix('filter/')}"


def relation_stage(source: Source) -> str:
    """Return the name of the stage that measures what the synthesizer of a source learnt."""
    return source.synthesizer.replace("tune/", "relation/")


def stages_of(config: RunConfig) -> dict[str, Stage]:
    """Return every stage of a run by name, each after the stages that make its inputs.

    Raises:
        UserError: a source whose synthesizer starts from an arm that the run does not train, or that reads the source itself.
    """
    builder = _Builder(config)
    builder.build()
    return builder.stages


class _Builder:
    """Adds the stages of a run, those that a stage needs before the stage itself."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.arms, self.sources = config, arms_of(config), sources_of(config)
        self.stages: dict[str, Stage] = {}
        self.pending: list[str] = []

    def build(self) -> None:
        config = self.config
        self.add(PREPARE, {}, steps.prepare, costs.prepare)
        for arm in self.arms.values():
            self.add_arm(arm)
        for source in used_sources(config).values():
            self.add_quality(source)
        for arm in self.arms.values():
            for run in arm.runs:
                inputs = {"corpus": PREPARE, "model": model_stage(arm, run)}
                self.add(evaluate_stage(run), inputs, steps.evaluate, costs.evaluate, arm=arm.name)
        scores = {run: evaluate_stage(run) for arm in self.arms.values() for run in arm.runs}
        runs = {arm.name: list(arm.runs) for arm in self.arms.values()}
        self.add(COMPARE, scores, steps.compare(runs), costs.compare)

    def add(
        self,
        name: str,
        inputs: dict[str, str],
        run: steps.Run,
        cost: CostFunction,
        *,
        config: RunConfig | None = None,
        arm: str = "",
    ) -> None:
        """Add a stage unless another arm or source did."""
        self.stages.setdefault(name, Stage(name, inputs, run, cost, config or self.config, arm))

    def add_arm(self, arm: Arm) -> None:
        """Add the training of an arm, after what it reads."""
        if model_stage(arm, arm.name) in self.stages:
            return
        inputs, settings = {"corpus": PREPARE}, arm.settings
        if settings.synthetic:
            source = self.sources[settings.synthetic]
            self.add_source(source)
            inputs["synthetic"] = source.documents
        if settings.order == "related":
            related = self.sources[DEFAULT_SOURCE]
            self.add_related(related)
            self.add(STITCHED, {"corpus": PREPARE, "pairs": related.related}, steps.stitch, costs.stitch)
            inputs["stitched"] = STITCHED
        cost = costs.pretraining(settings.resolve_recipe(self.config.pretrain))
        first, *more = arm.runs.items()
        for name, recipe in arm.candidates.items():
            self.add(train_stage(name), inputs, steps.train_arm(arm.name, first[1], recipe), cost, arm=arm.name)
        if arm.candidates:
            models = {name: train_stage(name) for name in arm.candidates}
            self.add(model_stage(arm, arm.name), models, steps.choose(arm.name), costs.choose, arm=arm.name)
            inputs = inputs | {"recipe": model_stage(arm, arm.name)}
        for run, seed in more if arm.candidates else arm.runs.items():
            self.add(train_stage(run), inputs, steps.train_arm(arm.name, seed), cost, arm=arm.name)

    def add_source(self, source: Source) -> None:
        """Add the stages of a source up to the documents that arms read."""
        config, corpus, cost = stage_config(self.config, source), {"corpus": PREPARE}, costs.of_model(source.settings.model)
        if source.name in self.pending:
            problem = f"starts from the arm {source.start}, which reads it"
            raise UserError(f"sources.{source.name}", problem, "name another arm in start")
        self.pending.append(source.name)
        model = {} if source.from_scratch else {"start": self._model_of(source)}
        self.pending.pop()
        if source.synthesizer:
            self.add_related(source)
            if source.pair != source.related:
                inputs = corpus | {"pairs": source.related}
                self.add(source.pair, inputs, steps.pair_at_random, costs.pair_at_random, config=config)
            inputs = corpus | {"pairs": source.pair} | model
            self.add(source.synthesizer, inputs, steps.tune(source.from_scratch), cost(costs.synthesizer), config=config)
        writer = source.synthesizer or model["start"]
        self.add(source.synthesize, corpus | {"model": writer}, steps.synthesize, cost(costs.synthesize), config=config)
        inputs = corpus | {"synthetic": source.synthesize}
        self.add(source.filter, inputs, steps.filter_documents, costs.filter_documents, config=config)
        if source.stitch:
            self.add(source.stitch, corpus | {"synthetic": source.filter}, steps.stitch, costs.stitch, config=config)

    def add_related(self, source: Source) -> None:
        """Add the stages that find related pairs, or the one that reads known pairs."""
        inputs = {"corpus": PREPARE}
        if not source.config.pair.file:
            self.add(EMBED, inputs, steps.embed, costs.embed)
            inputs = inputs | {"vectors": EMBED}
        self.add(source.related, inputs, steps.pair, costs.pair, config=source.config)

    def add_quality(self, source: Source) -> None:
        """Add what measures the synthesizer of a source, and its documents."""
        if source.synthesizer:
            documents = {"synthetic": source.synthesize, "filtered": source.filter, "pairs": source.related}
            if not source.config.pair.file:  # known pairs have no band of similarity to measure documents by
                inputs = {"corpus": PREPARE} | documents
                self.add(quality_stage(source), inputs, steps.quality, costs.quality, config=source.config)
            inputs = {"corpus": PREPARE, "pairs": source.related, "model": source.synthesizer}
            cost = costs.of_model(source.settings.model)(costs.relation)
            self.add(relation_stage(source), inputs, steps.relation, cost, config=source.config)

    def _model_of(self, source: Source) -> str:
        """Return the stage of the model that a source starts from, added before it."""
        if source.imports:
            model = source.settings.model
            self.add(source.start, {}, steps.import_model(model), costs.of_model(model)(costs.import_model))
            return source.start
        if source.start not in self.arms:
            known = ", ".join(self.arms)
            raise UserError(
                f"sources.{source.name}.start = {source.start}", "is no arm that this run trains", f"known: {known}"
            )
        arm = self.arms[source.start]
        self.add_arm(arm)
        return model_stage(arm, arm.name)


def needed_stages(stages: Mapping[str, Stage], name: str) -> set[str]:
    """Return the names of a stage and of all stages that it needs, directly or not."""
    needed, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current not in needed:
            needed.add(current)
            waiting += stages[current].inputs.values()
    return needed
