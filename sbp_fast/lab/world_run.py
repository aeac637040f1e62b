"""One world with one seed through the stages of an experiment, and its figures."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.experiment.arms import arms_of
from sbp_fast.experiment.graph import PREPARE, evaluate_stage, needed_stages, stages_of
from sbp_fast.experiment.run import claim_directory
from sbp_fast.experiment.sources import Source, used_sources
from sbp_fast.lab import metrics
from sbp_fast.lab.files import corpus_settings, write_world
from sbp_fast.lab.gates import conditional_loss, gate_sentence, sample_figures
from sbp_fast.lab.worlds import World, WorldSettings
from sbp_fast.model.saved import load_model
from sbp_fast.pairs.heldout_pairs import HeldoutPairs, PairSplit
from sbp_fast.pipeline.files import write_json
from sbp_fast.pipeline.manifest import MANIFEST, Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.evaluate import SCORES

CONFIG = "lab"
FIGURES = "figures.json"


def lab_config(overrides: Sequence[str]) -> RunConfig:
    """Return the shipped configuration of the lab with the overrides."""
    return load_config([CONFIG], overrides)


@dataclass(frozen=True)
class LabRun:
    """One world with one seed.

    Attributes:
        world: its settings.
        directory: of its files and stages.
        overrides: settings that replace those of the shipped configuration `lab`, as on the command line.
        quiet: whether to print nothing.
    """

    world: WorldSettings
    directory: Path
    overrides: tuple[str, ...] = ()
    quiet: bool = False

    @property
    def label(self) -> str:
        """What progress calls it, such as "two-names/seed-0"."""
        return "/".join(self.directory.parts[-2:])

    @property
    def config(self) -> RunConfig:
        """The configuration of its stages."""
        shipped = lab_config(self.overrides).model_dump()
        for section, settings in corpus_settings(self.directory / "world").items():
            shipped[section] |= settings
        return RunConfig.model_validate(shipped | {"seed": self.world.seed, "seeds": (self.world.seed,)})


def run_world(run: LabRun) -> dict[str, Any]:
    """Run every stage that the figures of a world need, and return these; a run that was stopped resumes.

    Returns:
        `world`, its settings; `bounds` in nats a value; of each arm its excess over the entropy, by metric and split; of each
        source with a synthesizer the figures of `conditional_loss`, and of every source those of `sample_figures`.
    """
    world, config, console = World(run.world), run.config, Console(quiet=True)
    claim_directory(config, run.directory, force=False)
    write_world(world, run.directory / "world")
    stages = stages_of(config)
    scores = {evaluate_stage(name) for arm in arms_of(config).values() for name in arm.runs}
    needed = set().union(*(needed_stages(stages, name) for name in scores))
    shown = Console(quiet=run.quiet)

    def run_stages(names: Collection[str]) -> None:
        for name, stage in stages.items():
            if name in names:
                shown.say(f"{run.label}: {name}")
                stage.run_in(run.directory, console=console)

    run_stages(needed - scores)
    gates = _gates(world, config, run.directory)
    for name, samples in gates["samples"].items():  # before any arm is scored
        shown.say(f"{run.label}: {gate_sentence(name, gates['synthesizers'].get(name), samples)}")
    run_stages(scores)
    figures = {**_figures(world, config, run.directory), **gates}
    write_json(run.directory / FIGURES, figures)
    return figures


def _gates(world: World, config: RunConfig, directory: Path) -> dict[str, Any]:
    prepared, sources = PreparedCorpus(directory / PREPARE), used_sources(config)
    return {
        "synthesizers": {
            name: _conditional(world, prepared, directory, source) for name, source in sources.items() if source.synthesizer
        },
        "samples": {
            name: sample_figures(world, prepared, Corpus(directory / source.synthesize)) for name, source in sources.items()
        },
    }


def _figures(world: World, config: RunConfig, directory: Path) -> dict[str, Any]:
    prepared = PreparedCorpus(directory / PREPARE)
    return {
        "world": asdict(world.settings),
        "bounds": {
            "entropy": world.entropy,
            "knowing_nothing": world.uniform - world.entropy,
            "one_telling": world.expected_loss(1) - world.entropy,
            "two_tellings": world.expected_loss(2) - world.entropy,
        },
        "arms": {
            arm.name: _excess(directory / evaluate_stage(name), prepared)
            for arm in arms_of(config).values()
            for name in arm.runs
        },
        "seconds": sum(Manifest.read(path.parent).seconds for path in directory.rglob(MANIFEST)),
    }


def _excess(scores: Path, prepared: PreparedCorpus) -> dict[str, dict[str, float]]:
    """Return each of the lab's metrics on the validation and on the test documents."""
    table, excess = pq.read_table(scores / SCORES), dict[str, dict[str, float]]()
    names, ids, numerators, denominators = (table[column].to_numpy() for column in ("metric", "id", "numerator", "denominator"))
    for metric in (metrics.EXCESS, metrics.EXCESS_LINKED):
        excess[metric] = {}
        for split in get_args(PairSplit):
            rows = (names == metric) & np.isin(ids, prepared.heldout.ids[getattr(prepared, split)])
            excess[metric][split] = float(numerators[rows].sum() / denominators[rows].sum())
    return excess


def _conditional(world: World, prepared: PreparedCorpus, directory: Path, source: Source) -> dict[str, Any]:
    model = load_model(directory / source.synthesizer, "cpu")
    return conditional_loss(world, model, prepared, HeldoutPairs.load(directory / source.related).of_split("test"))
