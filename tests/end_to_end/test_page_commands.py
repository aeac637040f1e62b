"""Commands of the documentation that read a finished run take seconds, so they are run as written, on a tiny one."""

import shutil
from pathlib import Path

import pytest
from page_commands import PAGES, Command, commands_of
from typer.testing import CliRunner

from sbp_fast.cli import app

READING = ("show", "sample", "export", "plan", "config", "neighbors")
"""Commands that read what a run wrote and change nothing of it."""
RUN = "runs/demo"
ALL = {command.words: command for page in PAGES for command in commands_of(page) if command.program == "sbp-fast"}


def is_run_here(command: Command) -> bool:
    """Whether a command needs no network, takes seconds, and reads the demo's run or nothing."""
    quick = command.words[1] in READING or "--once" in command.words
    return quick and "--push-to" not in command.words and all(word.startswith(RUN) for word in command.words if "/" in word)


COMMANDS = [command for command in ALL.values() if is_run_here(command)]


@pytest.fixture(scope="module")
def folder(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny run stands where the pages have the demo's."""
    directory = tmp_path_factory.mktemp("pages")
    shutil.copytree(tiny_run, directory / RUN)
    return directory


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_of_a_page_runs_as_written(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, list(command.words[1:]))
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.output.strip()


def test_commands_that_are_run_are_of_several_kinds() -> None:
    assert {command.words[1] for command in COMMANDS} >= {"show", "sample", "export", "plan", "watch"}
