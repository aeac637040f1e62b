"""A run with every control, and what another arm, seed or share recomputes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from small_run import SETTINGS, make_documents

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.experiment.run import run
from sbp_fast.pipeline.manifest import MANIFEST
from sbp_fast.pipeline.progress import Console

OWN_SETTINGS = (*SETTINGS, "name='controls'", "pretrain.tokens=4096", "validation.points=2", "validation.samples=1")


@dataclass
class Experiment:
    """A finished run with its settings."""

    directory: Path
    settings: list[str] = field(default_factory=list)

    def config(self, *more: str) -> RunConfig:
        return load_config(["small", "controls"], [*self.settings, *more])

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.directory / "results.json").read_text())

    def rerun(self, *more: str) -> set[str]:
        """Run again with other settings; return the names of the stages that were made or made again."""
        before = fingerprints(self.directory)
        run(self.config(*more), self.directory, console=Console(quiet=True), force=True)
        self.settings += more
        after = fingerprints(self.directory)
        return {name for name in after if after[name] != before.get(name)}


def fingerprints(directory: Path) -> dict[str, tuple[str, float]]:
    """Return the fingerprint of each finished stage, and when it was written."""
    paths = {str(path.parent.relative_to(directory)): path for path in directory.rglob(MANIFEST)}
    return {name: (json.loads(path.read_text())["fingerprint"], path.stat().st_mtime) for name, path in paths.items()}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("controls")
    lines = [json.dumps({"id": id, "text": text}) for id, text in make_documents().items()]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    experiment = Experiment(folder / "run", [f"corpus.path='{folder}/documents.jsonl'", *OWN_SETTINGS, "seeds=[0]"])
    run(experiment.config(), experiment.directory, console=Console(quiet=True))
    return experiment


def test_every_control_has_scores_and_its_own_documents(experiment: Experiment) -> None:
    results = experiment.results
    assert set(results["arms"]) == {
        *("baseline", "sbp", "baseline-tuned", "sbp-tuned", "random-pairs", "unconditional", "related-order", "megadocs"),
        "sbp-round-2",
    }
    tokens = {arm["tokens"] for arm in results["arms"].values()}
    assert max(tokens) - min(tokens) <= 0.01 * max(tokens)
    assert set(results["sources"]) == {"related", "random", "unconditional", "megadocs", "round-2"}
    assert results["sources"]["unconditional"]["synthesis"]["seeds"] == 0
    assert results["sources"]["random"]["pairs"] == results["sources"]["related"]["pairs"]
    assert results["arms"]["baseline-tuned"]["recipes_tried"] == results["arms"]["sbp-tuned"]["recipes_tried"] == 3
    assert results["arms"]["related-order"]["order"] == "related"
    page = (experiment.directory / "report.html").read_text()
    table = page[page.index('id="sources"') : page.index('id="examples"')]
    assert re.findall(r'<tr><th>([^<]+)<span class="note">new documents', table) == list(results["sources"])
    assert table.count("no synthesizer") == 1 and "it starts from the model of SBP" in table


def test_a_changed_arm_recomputes_itself_and_the_comparison(experiment: Experiment) -> None:
    changed = experiment.rerun("arms.megadocs.recipe.weight_decay=2.0")
    assert changed == {"train/megadocs", "evaluate/megadocs", "compare"}


def test_another_seed_of_one_arm_trains_that_seed(experiment: Experiment) -> None:
    changed = experiment.rerun("arms.baseline-tuned.seeds=[0, 1]")
    assert changed == {"train/baseline-tuned-seed-1", "evaluate/baseline-tuned-seed-1", "compare"}


def test_another_share_below_what_was_generated_draws_nothing(experiment: Experiment) -> None:
    changed = experiment.rerun("arms.sbp-less.synthetic=related", "arms.sbp-less.share=0.1")
    assert changed == {"train/sbp-less", "evaluate/sbp-less", "compare"}


def test_a_changed_source_recomputes_what_it_changes_and_its_reader(experiment: Experiment) -> None:
    changed = experiment.rerun("sources.round-2.synthesize.temperature=1.2")
    assert changed == {
        *(f"{stage}/round-2" for stage in ("synthesize", "filter", "quality")),
        *("train/sbp-round-2", "evaluate/sbp-round-2", "compare"),
    }


def test_a_finished_run_recomputes_nothing(experiment: Experiment) -> None:
    assert experiment.rerun() == set()
