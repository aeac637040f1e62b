"""A small finished run with every kind of file, whose stages can be run again one by one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from killed_stage import count_writes
from small_run import SETTINGS, make_documents

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.experiment.graph import Step, stages_of
from sbp_fast.experiment.report.page import write_report
from sbp_fast.experiment.run import claim_directory
from sbp_fast.neighbors.query import Neighbor, find_neighbors
from sbp_fast.pipeline.manifest import LOGS, Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.huggingface import export_hugging_face

CHANGES = (
    "corpus.on_error='skip'",
    "corpus.deduplicate='near'",
    "corpus.shard_tokens=2000",
    "embed.shard_documents=40",
    "pair.save_index=true",
    "pair.target_recall=0.5",
    "pair.partition_documents=64",
    "checkpoint={seconds=0, keep=2}",
    "validation={points=2, tokens=200, samples=1}",
    "synthesize.shard_seeds=8",
)


@dataclass(frozen=True)
class FinishedRun:
    """A run, the durable writes that each of its stages took, and what other commands make of it.

    Attributes:
        outputs: files and counts of each stage.
        exported: files of the baseline as a Hugging Face directory.
        neighbors: answer of `query`.
    """

    config: RunConfig
    directory: Path
    writes: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    exported: dict[str, Any] = field(default_factory=dict)
    neighbors: list[Neighbor] = field(default_factory=list)

    def step(self, name: str, out: Path) -> Step:
        """Return the step that writes the output of a stage to `out`, from the inputs in this run."""
        stage = stages_of(self.config)[name]
        inputs = {key: self.directory / source for key, source in stage.inputs.items()}
        return Step(stage.config, out, inputs, Console(quiet=True))

    def query(self) -> list[Neighbor]:
        """Return the documents nearest to one, from the saved index."""
        index, corpora, vectors = (self.directory / name for name in ("pair/related", "prepare", "embed"))
        return find_neighbors(self.config, index, corpora=[corpora], vectors=[vectors], document=self.document)

    @property
    def document(self) -> str:
        """Id of a unique document."""
        return str(PreparedCorpus(self.directory / "prepare").unique.id(0))


def output(directory: Path) -> tuple[Any, Any]:
    """Return the files and the counts of a finished stage, without what differs from one time to the next."""
    manifest = Manifest.load(directory)
    files = {name: entry for name, entry in manifest.files.items() if Path(name).name not in LOGS}
    return files, {name: value for name, value in manifest.counts.items() if not name.endswith("_seconds")}


def make_finished_run(folder: Path) -> FinishedRun:
    """Run all stages in `folder`, and count the durable writes of each."""
    lines = [json.dumps({"id": id, "text": text}) for id, text in make_documents().items()]
    (folder / "documents.jsonl").write_text("\n".join([*lines, "no JSON", ""]))
    config = load_config(["small"], [f"corpus.path='{folder / 'documents.jsonl'}'", *SETTINGS, *CHANGES])
    run = FinishedRun(config, folder / "run")
    claim_directory(config, run.directory, force=False)
    for name, stage in stages_of(config).items():
        with pytest.MonkeyPatch.context() as patch:
            writes = count_writes(patch)
            stage.run(run.step(name, run.directory / name))
            run.writes[name] = writes()
        run.outputs[name] = output(run.directory / name)
    write_report(run.directory)
    export_hugging_face(run.directory / "train/baseline", run.directory / "prepare/tokenizer.json", folder / "exported")
    run.exported.update(Manifest.read(folder / "exported").files)
    run.neighbors.extend(run.query())
    return run
