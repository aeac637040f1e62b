"""`--dry-run`: it says what `run` and `train` then do, refuses what they refuse, and writes nothing."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sbp_fast.cli import app
from sbp_fast.config import RunConfig
from sbp_fast.config.files import dump_config, load_config
from sbp_fast.errors import UserError
from sbp_fast.experiment.dry_run import describe, dry_run_entries
from sbp_fast.experiment.graph import stages_of
from sbp_fast.experiment.run import run
from sbp_fast.pipeline.manifest import CLOCK, MANIFEST, PLAN, Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.seals import write_sealed_json

Tree = dict[Path, tuple[int, int, int]]
QUIET = Console(quiet=True)


def tree(directory: Path) -> Tree:
    """Return inode, size and time of change of everything in a directory."""
    statuses = {path: os.lstat(path) for path in (directory, *directory.rglob("*"))}
    return {path: (status.st_ino, status.st_size, status.st_mtime_ns) for path, status in statuses.items()}


def actions(config: RunConfig, out: Path, *, force: bool = False, until: str = "") -> dict[str, str]:
    return {entry.name: entry.planned.action for entry in dry_run_entries(config, out, force=force, until=until)}


@pytest.fixture
def copied_run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def begin(directory: Path, seconds: float) -> None:
    """Turn a finished output into an unfinished one of the same plan."""
    manifest, partial = Manifest.read(directory), directory.with_name(directory.name + ".partial")
    shutil.rmtree(directory)
    partial.mkdir()
    write_sealed_json(partial / PLAN, {"stage": manifest.stage, "config": manifest.config, "inputs": manifest.inputs})
    write_sealed_json(partial / CLOCK, {"seconds": seconds})


def test_dry_run_of_a_finished_run_skips_every_stage_and_writes_nothing(tiny_config: RunConfig, tiny_run: Path) -> None:
    before = tree(tiny_run.parent)
    entries = dry_run_entries(tiny_config, tiny_run)
    assert tree(tiny_run.parent) == before
    assert {entry.name: entry.planned.action for entry in entries} == dict.fromkeys(stages_of(tiny_config), "skip")
    (entry,) = (entry for entry in entries if entry.name == "train/sbp")
    assert (entry.inputs, entry.seconds) == (("prepare", "filter/related"), Manifest.read(tiny_run / "train/sbp").seconds)
    assert describe(entries, tiny_run)[-1] == "nothing was written"


def test_dry_run_of_a_new_run_says_that_all_stages_run_and_makes_no_directory(tiny_config: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "new"
    entries = dry_run_entries(tiny_config, out)
    assert {entry.name: entry.planned.action for entry in entries} == dict.fromkeys(stages_of(tiny_config), "run")
    assert actions(tiny_config, out, until="embed") == {"prepare": "run", "embed": "run"}
    assert list(tmp_path.iterdir()) == []
    assert next(entry.name for entry in entries if entry.seconds is None) == "train/baseline"  # no speed has been measured


def test_run_does_what_the_dry_run_said(tiny_config: RunConfig, copied_run: Path) -> None:
    for name in ("compare", "evaluate/sbp"):
        shutil.rmtree(copied_run / name)
    begin(copied_run / "evaluate/oracle", seconds=65)
    before = tree(copied_run)
    entries = dry_run_entries(tiny_config, copied_run)
    assert tree(copied_run) == before
    said = {entry.name: entry.planned for entry in entries if entry.planned.action != "skip"}
    expected = {"evaluate/sbp": "run", "evaluate/oracle": "resume", "compare": "run"}
    assert {name: planned.action for name, planned in said.items()} == expected
    assert said["evaluate/oracle"].reason == "after 1m05s of work"
    assert all(entry.seconds is not None for entry in entries)  # the other evaluation tells the speed
    left = [copied_run / name / MANIFEST for name in stages_of(tiny_config) if name not in said]
    times = [path.stat().st_mtime_ns for path in left]
    run(tiny_config, copied_run, console=QUIET)
    assert times == [path.stat().st_mtime_ns for path in left]
    assert set(actions(tiny_config, copied_run).values()) == {"skip"}


def test_dry_run_with_a_changed_setting_is_refused_as_the_run_is_and_with_force_names_what_is_replaced(
    copied_run: Path,
) -> None:
    changed = load_config([copied_run / "config.toml"], ["synthesize.temperature=0.5"])
    before = tree(copied_run)
    refusals = []
    calls: list[Callable[[], object]] = [
        lambda: dry_run_entries(changed, copied_run),
        lambda: run(changed, copied_run, console=QUIET),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"holds another run: synthesize\.temperature: 1\.0 -> 0\.5") as caught:
            call()
        refusals.append(str(caught.value))
    assert refusals[0] == refusals[1]
    actions = {entry.name: entry.planned for entry in dry_run_entries(changed, copied_run, force=True)}
    assert tree(copied_run) == before
    assert actions["synthesize/related"].action == "replace"
    assert actions["synthesize/related"].reason == "synthesize.temperature: 1.0 -> 0.5"
    assert actions["train/sbp"].reason == "unless its inputs come out the same" and actions["train/oracle"].action == "skip"


def test_dry_run_ends_at_the_stage_that_the_run_refuses(tiny_config: RunConfig, copied_run: Path) -> None:
    replace(Manifest.read(copied_run / "embed"), inputs={"corpus": "another"}).write(copied_run / "embed")
    *others, last = dry_run_entries(tiny_config, copied_run)
    assert (last.name, last.planned.action, last.planned.reason) == ("embed", "refuse", "input corpus changed")
    assert {entry.planned.action for entry in others} == {"skip"}
    assert actions(tiny_config, copied_run, force=True)["embed"] == "replace"


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    app(arguments, standalone_mode=False)
    return [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_commands_print_the_dry_run_and_write_nothing(
    tiny_config: RunConfig, copied_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied_run.parent)
    monkeypatch.setenv("COLUMNS", "100")
    Path("tiny.toml").write_text(dump_config(tiny_config))
    before = tree(copied_run.parent)
    lines = shown(["run", "tiny.toml", "--out", "run", "--dry-run"], capsys)
    assert any(line.split()[:2] == ["train/sbp", "skip"] for line in lines)
    assert any(line.startswith("done before; from ") for line in lines)
    assert lines[-3] == f"{len(stages_of(tiny_config))} done before" and lines[-1] == "nothing was written"
    options = ["train", "tiny.toml", "--arm", "sbp", "--corpus", "run/prepare", "--dry-run"]
    lines = shown([*options, "--synthetic", "run/filter/related", "--out", "sbp"], capsys)
    assert any(line.split()[:2] == ["sbp", "run"] for line in lines) and "1 to run" in lines
    assert "1 done before" in shown([*options, "--synthetic", "run/filter/related", "--out", "run/train/sbp"], capsys)
    with pytest.raises(UserError, match="training sbp: needs --synthetic"):
        app([*options, "--out", "sbp"], standalone_mode=False)
    assert tree(copied_run.parent) == before
