"""Damage to any file of a finished or a begun directory: the next command names it in one line, or its output is the same."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from damage import damage
from finished_run import FinishedRun, output
from killed_stage import Killed, count_writes

from sbp_fast.errors import UserError
from sbp_fast.experiment.graph import PREPARE, stages_of
from sbp_fast.experiment.report.page import write_report
from sbp_fast.experiment.run import run
from sbp_fast.pipeline.manifest import MANIFEST
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.huggingface import export_hugging_face

SAMPLE, ALL = 20, 500  # random damages of each kind of directory
BEGUN_USES = 12  # damages of one begun directory, which takes as long to make as a stage


@dataclass(frozen=True)
class Outcome:
    """What a command did after a damage: the one line that it refused with, or whether its output was that without damage."""

    line: str = ""
    unchanged: bool = False


def outcome_of(command: Callable[[], Any], unchanged: Callable[[Any], bool]) -> Outcome:
    """Run a command; every exception but that of a user's mistake goes on to fail the test."""
    try:
        result = command()
    except UserError as error:
        return Outcome(line=str(error))
    return Outcome(unchanged=unchanged(result))


def files_of(directory: Path, dice: random.Random) -> Path:
    return dice.choice(sorted(path for path in directory.rglob("*") if path.is_file()))


def check(outcome: Outcome, file: Path, directory: Path, what: str) -> None:
    """Assert that a command named the damaged file in one line, or that its output is the one without damage."""
    assert "\n" not in outcome.line, what
    names = {file.name, directory.name} if file.name == MANIFEST else {file.name}
    assert outcome.unchanged or any(name in outcome.line for name in names), f"{what}: {outcome}"


# --- finished directories


def read_by_a_later_stage(finished: FinishedRun, name: str, out: Path, dice: random.Random) -> Outcome:
    """Run a stage that reads the output of another."""
    stages = stages_of(finished.config)
    later = dice.choice([reader for reader, stage in stages.items() if name in stage.inputs.values()])
    return outcome_of(lambda: stages[later].run(finished.step(later, out)), lambda _: output(out) == finished.outputs[later])


def read_by_the_report(finished: FinishedRun, name: str, out: Path, dice: random.Random) -> Outcome:
    """Write the report again."""
    paths = [finished.directory / "results.json", finished.directory / "report.html"]
    before = [path.read_bytes() for path in paths]
    return outcome_of(lambda: write_report(finished.directory), lambda _: [path.read_bytes() for path in paths] == before)


def read_by_the_whole_run(finished: FinishedRun, name: str, out: Path, dice: random.Random) -> Outcome:
    """Run the whole experiment again, of which all stages are done."""
    copy = Path(shutil.copytree(finished.directory, out))

    def unchanged(_: Path) -> bool:  # a stage of which nothing was left has run again
        return all(output(copy / stage) == expected for stage, expected in finished.outputs.items())

    return outcome_of(lambda: run(finished.config, copy, console=Console(quiet=True)), unchanged)


def read_by_export(finished: FinishedRun, name: str, out: Path, dice: random.Random) -> Outcome:
    """Export a model with the tokenizer."""
    model, tokenizer = finished.directory / "train/baseline", finished.directory / PREPARE / "tokenizer.json"
    command = lambda: export_hugging_face(model, tokenizer, out)  # noqa: E731
    return outcome_of(command, lambda _: output(out)[0] == finished.exported)


def read_by_a_query(finished: FinishedRun, name: str, out: Path, dice: random.Random) -> Outcome:
    """Look for the documents nearest to one."""
    return outcome_of(finished.query, lambda neighbors: neighbors == finished.neighbors)


def damage_finished(finished: FinishedRun, folder: Path, count: int, seed: int) -> dict[str, int]:
    """Damage finished directories so often; return how often each outcome was seen."""
    dice, seen = random.Random(seed), {"refused": 0, "unchanged": 0}
    stages = list(stages_of(finished.config))
    inputs = {source for stage in stages_of(finished.config).values() for source in stage.inputs.values()}
    for number in range(count):
        name = dice.choice(stages)
        readers = [read_by_the_report, read_by_the_whole_run, *[read_by_a_later_stage] * 3 * (name in inputs)]
        readers += [read_by_export] * (name in ("train/baseline", PREPARE))
        readers += [read_by_a_query] * (name in ("pair/related", "embed", PREPARE))
        reader, directory = dice.choice(readers), finished.directory / name
        file = files_of(directory, dice)
        before = file.read_bytes()
        what = f"finished {name}/{file.name} {damage(file, dice)}, {reader.__name__}"
        try:
            outcome = reader(finished, name, folder / str(number), dice)
        finally:
            file.write_bytes(before)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        check(outcome, file, directory, what)
        seen["refused" if outcome.line else "unchanged"] += 1
    return seen


# --- begun directories


def begin(finished: FinishedRun, name: str, out: Path, dice: random.Random) -> Path:
    """Run a stage until it is killed after some of its durable writes; return the directory that it leaves."""
    kill_after = dice.randrange(2, max(3, finished.writes[name]))
    with pytest.MonkeyPatch.context() as patch:
        count_writes(patch, kill_after)
        with suppress(Killed):  # what is written by the clock may be written less often than before
            stages_of(finished.config)[name].run(finished.step(name, out))
    return out.with_name(f"{out.name}.partial")


def damage_begun(finished: FinishedRun, folder: Path, count: int, seed: int, stages: list[str] | None = None) -> dict[str, int]:
    """Damage begun directories so often, and run their stages to the end; return how often each outcome was seen."""
    dice, seen = random.Random(seed), {"refused": 0, "unchanged": 0}
    begun: Path | None = None
    for number in range(count):
        if number % BEGUN_USES == 0 or begun is None:
            shutil.rmtree(folder, ignore_errors=True)
            name, begun = dice.choice(stages or list(finished.writes)), None
            (folder / "begun").mkdir(parents=True)
            begun = begin(finished, name, folder / "begun" / "out", dice)
            if not begun.is_dir():  # killed between the last rename and the end, or not at all
                begun = None
                continue
        out = folder / str(number) / "out"
        copy = Path(shutil.copytree(begun, out.with_name("out.partial")))
        file = files_of(copy, dice)
        what = f"begun {name}/{file.relative_to(copy)} {damage(file, dice)}"
        expected, stage = finished.outputs[name], stages_of(finished.config)[name]
        step = finished.step(name, out)
        outcome = outcome_of(lambda stage=stage, step=step: stage.run(step), lambda _, o=out, e=expected: output(o) == e)
        check(outcome, file, copy, what)
        seen["refused" if outcome.line else "unchanged"] += 1
    return seen


@pytest.mark.parametrize("count", [SAMPLE, pytest.param(ALL, marks=pytest.mark.slow)])
def test_damage_to_a_finished_directory_is_named_or_changes_nothing(
    count: int, finished_run: FinishedRun, tmp_path: Path
) -> None:
    seen = damage_finished(finished_run, tmp_path / "work", count, seed=count)
    print(seen)
    assert seen["refused"] > 0.8 * count


@pytest.mark.parametrize("count", [SAMPLE, pytest.param(ALL, marks=pytest.mark.slow)])
def test_damage_to_a_begun_directory_is_named_or_changes_nothing(count: int, finished_run: FinishedRun, tmp_path: Path) -> None:
    seen = damage_begun(finished_run, tmp_path / "work", count, seed=count)
    print(seen)
    assert sum(seen.values()) > 0.8 * count
