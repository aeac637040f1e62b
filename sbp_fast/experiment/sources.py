"""The sources of synthetic documents, with the names of their stages; sources share every stage that they agree on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sbp_fast.config import RunConfig, SourceConfig
from sbp_fast.config.sources import SCRATCH
from sbp_fast.pipeline.files import dump_json


@dataclass(frozen=True)
class Source:
    """One source, and the names of the stages that make it; a stage is named after the first source that needs it.

    Attributes:
        name: of the table [sources.NAME].
        settings: the table.
        config: the run's configuration with the source's changes.
        start: arm whose first model the synthesizer starts from, or which generates; "scratch" for random weights; the stage
            that imports a model pretrained elsewhere.
        related: stage that finds related pairs; "" where nothing is tuned.
        pair: stage whose pairs the synthesizer is tuned on, `related` unless they are random; "" where nothing is tuned.
        synthesizer: stage that tunes the synthesizer; "" where the model of `start` generates.
        synthesize: stage that generates documents.
        filter: stage that filters them.
        stitch: stage that joins the filtered documents of a seed; "" where they stay apart.
    """

    name: str
    settings: SourceConfig
    config: RunConfig
    start: str
    related: str
    pair: str
    synthesizer: str
    synthesize: str
    filter: str
    stitch: str

    @property
    def from_scratch(self) -> bool:
        """Whether the synthesizer starts from random weights."""
        return self.start == SCRATCH

    @property
    def imports(self) -> bool:
        """Whether the synthesizer starts from a model pretrained elsewhere."""
        return bool(self.settings.model)

    @property
    def documents(self) -> str:
        """Stage whose output arms read."""
        return self.stitch or self.filter


def sources_of(config: RunConfig) -> dict[str, Source]:
    """Return every source of the configuration by name, whether an arm reads it or not, so that names do not depend on arms."""
    owners: dict[str, str] = {}

    def stage(command: str, name: str, *depends: Any) -> str:
        """Return the name of a stage: the first source in the configuration that depends on the same things names it."""
        return owners.setdefault(dump_json([command, *depends], name), f"{command}{name}")

    return {name: _source(config, name, stage) for name in config.sources}


def _source(config: RunConfig, name: str, stage: Callable[..., str]) -> Source:
    settings, changed = config.sources[name], config.with_source(name)
    start = settings.start or config.baseline
    if settings.model:
        start = stage("import/", name, settings.model)
    related = pair = synthesizer = stitch = ""
    if settings.pairs != "none":
        related = stage("pair/", name, "related", changed.pair.settings())
        pair = related if settings.pairs == "related" else stage("pair/", name, settings.pairs, related)
        synthesizer = stage("tune/", name, pair, start, changed.synthesizer.settings())
    synthesize = stage("synthesize/", name, synthesizer or start, changed.synthesize.settings())
    filtered = stage("filter/", name, synthesize, changed.filter.settings())
    if settings.stitched:
        stitch = stage("stitch/", name, filtered)
    return Source(name, settings, changed, start, related, pair, synthesizer, synthesize, filtered, stitch)


def used_sources(config: RunConfig) -> dict[str, Source]:
    """Return the sources that enabled arms read, by name."""
    read = {arm.synthetic for arm in config.enabled_arms.values()}
    return {name: source for name, source in sources_of(config).items() if name in read}


def stage_config(config: RunConfig, source: Source) -> RunConfig:
    """Return the configuration for the stages of a source, with those arms only that read documents of the same generation.

    How many documents are generated follows from these arms.
    """
    same = {name for name, other in sources_of(config).items() if other.synthesize == source.synthesize}
    arms = {name: arm for name, arm in config.arms.items() if name == config.baseline or arm.synthetic in same}
    return source.config.model_copy(update={"arms": arms})
