"""A small run in terminals of 80 and of 120 columns: banner, bars that move, a line for each stage, details on request."""

import json
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from rich.cells import cell_len
from small_run import SETTINGS, make_documents

from bench.terminal import Session, run_in_terminal
from sbp_fast.config.files import load_config
from sbp_fast.experiment.graph import stages_of
from sbp_fast.experiment.side_by_side import stage_title

pytestmark = pytest.mark.slow  # test_terminal.py has the same in short
STILL_SECONDS = 2.0  # that a bar may stand still


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Session]:
    """The run up to its first training at 80 columns, and its first training again at 120, with details."""
    directory = tmp_path_factory.mktemp("terminal")
    lines = (json.dumps({"id": name, "text": text}) for name, text in make_documents(60).items())
    (directory / "documents.jsonl").write_text("\n".join(lines))
    settings = ["small", f"corpus.path='{directory / 'documents.jsonl'}'", *SETTINGS]
    command = [sys.executable, "-m", "sbp_fast", "run", *settings, "--out", str(directory / "run")]
    command += ["--until", "train/baseline"]
    first = run_in_terminal(command, 80)
    shutil.rmtree(directory / "run" / "train" / "baseline")
    return {80: first, 120: run_in_terminal([*command, "--verbose"], 120)}


def numbered(name: str) -> str:
    return f"[{stage_title(stages_of(load_config(['small'], SETTINGS)), name)}]"


def test_banner_comes_first_and_each_stage_ends_with_one_line(sessions: dict[int, Session], tmp_path: Path) -> None:
    first, second = (session.lines for session in sessions.values())
    assert [session.exit_code for session in sessions.values()] == [0, 0], (first, second)
    text = " ".join(line.strip() for line in first)
    banner = r"run small: 2 stages; into \S+/run device: cpu, 1 thread; expected: (at least|not known yet)"
    assert re.match(banner, text)
    for name in ("prepare", "train/baseline"):
        assert len(re.findall(rf"{re.escape(numbered(name))} finished in \d+s", text)) == 1
    assert f"{numbered('train/baseline')} finished in" in first[-2] and "left" not in first[-2]
    assert second[0].startswith("run small: 2 stages, 1 of them done before; into ")
    assert f"{numbered('prepare')} done before" in second


@pytest.mark.parametrize("columns", [80, 120])
def test_no_row_is_wider_than_the_terminal(sessions: dict[int, Session], columns: int) -> None:
    settings = [row for row in sessions[columns].rows if cell_len(row) > columns and " " in row.strip()]
    assert settings == []  # a path may be longer


@pytest.mark.parametrize("columns", [80, 120])
def test_bar_moves_from_the_start_of_the_command_to_its_end(sessions: dict[int, Session], columns: int) -> None:
    times = sessions[columns].times("━")
    assert len(times) > 10
    assert max(after - before for before, after in pairwise(times)) < STILL_SECONDS
    for name in ("prepare", "train/baseline"):
        assert sessions[columns].times(re.escape(numbered(name)) + ".*━")


def test_details_are_printed_with_verbose_alone(sessions: dict[int, Session]) -> None:
    first, second = ("\n".join(session.lines) for session in sessions.values())
    assert "padding" not in first and "layers in" not in first
    assert "padding of the packed sequences" in second and "layers in float32" in second
