"""The path of an output: links, long names, its lock, and errors of the disk."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError
from sbp_fast.experiment.run import claim_directory
from sbp_fast.pipeline.output import disk_errors_are_user_errors, locked
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage

LOCKING = Path(__file__).parent.parent / "support" / "locking.py"


def write_a_file(context: StageContext) -> None:
    (context.directory / "out.txt").write_text("whole")


def must_not_run(context: StageContext) -> None:
    raise AssertionError("work began before the output was refused")


def stage(out: Path, body: Any = write_a_file) -> None:
    run_stage("write", out, config={}, inputs={}, body=body, console=Console(quiet=True))


@pytest.mark.parametrize(
    ("processes", "entries"), [(4, 100), pytest.param(4, 5000, marks=pytest.mark.slow)], ids=["sample", "20000"]
)
def test_lock_entered_by_several_processes_has_one_holder_at_a_time(processes: int, entries: int, tmp_path: Path) -> None:
    command = [sys.executable, str(LOCKING), str(tmp_path / "out"), str(entries)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    assert [process.communicate(timeout=500)[0].split() for process in running] == [[str(entries), "0"]] * processes
    assert list(tmp_path.iterdir()) == []


def test_lock_file_that_is_a_link_is_refused_and_its_target_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / ".out.lock").symlink_to("thesis.tex")
    with pytest.raises(UserError, match=r"\.out\.lock: is no lock file"):
        stage(tmp_path / "out", must_not_run)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_lock_path_taken_by_something_else_is_refused(kind: str, tmp_path: Path) -> None:
    (os.mkfifo if kind == "pipe" else os.mkdir)(tmp_path / ".out.lock")
    if kind == "pipe":
        stage(tmp_path / "out")  # can be locked as a file can
    else:
        with pytest.raises(UserError, match=r"\.out\.lock: is no lock file"):
            stage(tmp_path / "out", must_not_run)


def test_locking_leaves_the_content_of_the_lock_file(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("mine")
    with locked(tmp_path / "out"):
        assert (tmp_path / ".out.lock").read_text() == "mine"


@pytest.mark.parametrize("target", ["elsewhere", "elsewhere/deep"])
def test_output_through_a_dangling_link_is_written_where_it_leads(target: str, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(target)
    stage(tmp_path / "out")
    stage(tmp_path / "out", must_not_run)
    assert (tmp_path / target / "out.txt").is_file() and (tmp_path / "out").is_symlink()


def test_output_and_a_link_to_it_have_one_lock(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")

    def body(context: StageContext) -> None:
        with pytest.raises(UserError, match="another process"):
            stage(tmp_path / "link", must_not_run)
        write_a_file(context)

    stage(tmp_path / "out", body)


def test_run_through_a_dangling_link_claims_the_directory_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("elsewhere")
    claim_directory(load_config(["demo"]), tmp_path / "run", force=False)
    assert (tmp_path / "elsewhere" / "config.toml").is_file()


@pytest.mark.parametrize("claim", [False, True])
@pytest.mark.parametrize("name", ["n" * 250, "é" * 122, "n" * 300, "/".join(["n" * 200] * 20)], ids=["250", "é", "300", "deep"])
def test_output_of_a_long_name_is_refused_before_work(name: str, claim: bool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too long"):
        if claim:
            claim_directory(load_config(["demo"]), tmp_path / name, force=False)
        else:
            stage(tmp_path / name, must_not_run)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_partial_directory_that_is_a_link_or_a_file_is_refused(kind: str, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex.tmp").write_text("mine")
    if kind == "file":
        partial.write_text("")
    else:
        partial.symlink_to("mine" if kind == "link" else "nowhere")
    with pytest.raises(UserError, match=r"out\.partial: is no directory"):
        stage(tmp_path / "out", must_not_run)
    assert (tmp_path / "mine" / "thesis.tex.tmp").read_text() == "mine"


@pytest.mark.parametrize("out", ["file/out", "loop", "/"])
def test_output_at_an_impossible_path_is_refused_before_work(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError):
        stage(tmp_path / out, must_not_run)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "x"), Exception("I/O error: No space left on device (os error 28)"), RuntimeError("torch's own")],
)
def test_full_disk_reported_by_any_library_is_one_line(error: Exception, tmp_path: Path) -> None:
    if isinstance(error, RuntimeError):
        error.__context__ = OSError(errno.ENOSPC, "x")
    with pytest.raises(UserError, match="No space left on device; free some space"), disk_errors_are_user_errors(tmp_path):
        raise error
