"""The stage contract: done, resumable or stale; whole or absent."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbp_fast.errors import TransientError, UserError
from sbp_fast.pipeline.files import atomic_open, link, read_json, write_json
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.seals import write_sealed_json
from sbp_fast.pipeline.stage import StageContext, run_stage

QUIET = Console(quiet=True)


class Counting:
    """A body of three parts that remembers which it wrote, and can be made to die after some."""

    def __init__(self, die_after: int | None = None, text: str = "part") -> None:
        self.die_after, self.text = die_after, text
        self.wrote: list[int] = []

    def __call__(self, context: StageContext) -> None:
        for part in range(3):
            path = context.directory / f"{part}.txt"
            if path.exists():
                continue
            if self.die_after == part:
                raise KeyboardInterrupt
            with atomic_open(path) as file:
                file.write(f"{self.text} {part}".encode())
            self.wrote.append(part)
            context.save_clock()
        context.record(parts=3)
        context.flops = 7.0


def stage(out: Path, body: Any, config: dict[str, Any] | None = None, force: bool = False, **inputs: Path | str) -> Manifest:
    return run_stage("count", out, config=config or {"size": 1}, inputs=inputs, body=body, console=QUIET, force=force)


def test_finished_stage_is_complete_and_not_run_again(tmp_path: Path) -> None:
    manifest = stage(tmp_path / "out", Counting())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.txt", "1.txt", "2.txt", "manifest.json"]
    assert (manifest.counts, manifest.flops) == ({"parts": 3}, 7.0)
    again = Counting()
    assert stage(tmp_path / "out", again) == manifest
    assert again.wrote == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_interrupted_stage_resumes_to_the_same_output(tmp_path: Path) -> None:
    whole = stage(tmp_path / "whole", Counting())
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "out", Counting(die_after=2))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "9.txt.tmp").write_text("half")
    rest = Counting()
    assert stage(tmp_path / "out", rest).fingerprint == whole.fingerprint
    assert rest.wrote == [2]


@pytest.mark.parametrize("name", ["plan.json", "clock.json"])
def test_stage_killed_before_the_rename_finishes_without_rerunning(tmp_path: Path, name: str, monkeypatch: Any) -> None:
    real = os.replace

    def die(source: Any, target: Any) -> None:
        if Path(source).name == "out.partial":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "out", Counting())
    monkeypatch.undo()
    rest = Counting()
    manifest = stage(tmp_path / "out", rest)
    assert rest.wrote == []
    assert name not in manifest.files
    assert not (tmp_path / "out" / name).exists()


def test_changed_setting_or_input_is_refused_with_the_change(tmp_path: Path) -> None:
    stage(tmp_path / "out", Counting(), source="one")
    with pytest.raises(UserError, match=r"size: 1 -> 2; input source changed.*--force"):
        stage(tmp_path / "out", Counting(), {"size": 2}, source="two")
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "half", Counting(die_after=1))
    with pytest.raises(UserError, match=r"begun with other settings or inputs: size: 1 -> 2"):
        stage(tmp_path / "half", Counting(), {"size": 2})
    forced = Counting(text="new")
    stage(tmp_path / "half", forced, {"size": 2}, force=True)
    assert forced.wrote == [0, 1, 2]
    assert stage(tmp_path / "out", Counting(), {"size": 2}, force=True, source="two").config == {"size": 2}


def test_force_with_nothing_changed_does_not_rerun(tmp_path: Path) -> None:
    stage(tmp_path / "out", Counting())
    again = Counting()
    stage(tmp_path / "out", again, force=True)
    assert again.wrote == []


def test_unfinished_or_damaged_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished stage"):
        stage(tmp_path / "out", Counting(), before=tmp_path / "before")
    stage(tmp_path / "before", Counting())
    (tmp_path / "before" / "1.txt").write_text("part X")
    with pytest.raises(UserError, match=r"1\.txt: missing or damaged"):
        stage(tmp_path / "out", Counting(), before=tmp_path / "before")
    assert not (tmp_path / "out.partial").exists()


def test_output_of_a_changed_input_is_refused_as_stale(tmp_path: Path) -> None:
    stage(tmp_path / "before", Counting())
    stage(tmp_path / "out", Counting(), before=tmp_path / "before")
    stage(tmp_path / "before", Counting(text="other"), {"size": 2}, force=True)
    with pytest.raises(UserError, match="input before changed"):
        stage(tmp_path / "out", Counting(), before=tmp_path / "before")


def test_directory_of_other_files_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="no stage's output"):
        stage(tmp_path / "out", Counting(), force=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_logs_are_listed_without_changing_the_fingerprint(tmp_path: Path) -> None:
    def body(seconds: str) -> Any:
        return lambda context: (context.directory / "metrics.jsonl").write_text(seconds)

    first, second = stage(tmp_path / "a", body("1.0")), stage(tmp_path / "b", body("2.0"))
    assert first.files.keys() == {"metrics.jsonl"}
    assert first.fingerprint == second.fingerprint


def test_seconds_are_summed_over_attempts(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "out", Counting(die_after=1))
    write_sealed_json(tmp_path / "out.partial" / "clock.json", {"seconds": 1000.0})
    assert stage(tmp_path / "out", Counting()).seconds >= 1000


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "No space left"), (errno.EACCES, "Permission denied")])
def test_full_or_write_protected_disk_is_a_user_error(tmp_path: Path, number: int, words: str) -> None:
    def body(context: StageContext) -> None:
        raise OSError(number, os.strerror(number), str(context.directory))

    with pytest.raises(UserError, match=words):
        stage(tmp_path / "out", body)
    assert not (tmp_path / "out").exists()


def test_second_writer_of_an_output_is_refused(tmp_path: Path) -> None:
    def body(context: StageContext) -> None:
        with pytest.raises(UserError, match="another process"):
            stage(tmp_path / "out", Counting())

    stage(tmp_path / "out", body)


def test_atomic_open_with_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError), atomic_open(tmp_path / "a.json") as file:
        file.write(b"{")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_save_array_on_a_full_disk_raises_and_leaves_no_file(tmp_path: Path) -> None:
    """By itself numpy writes without Python, and its error does not say that the disk is full."""
    program = """
import pathlib, resource, sys
import numpy as np
from sbp_fast.pipeline.files import save_array
path = pathlib.Path(sys.argv[1])
save_array(path / "small.npy", np.arange(10.0)[::-1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_array(path / "large.npy", np.zeros(100_000))
except OSError as error:
    sys.exit(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == errno.EFBIG, done.stderr
    assert np.load(tmp_path / "small.npy").tolist() == list(range(9, -1, -1))
    assert [path.name for path in tmp_path.iterdir()] == ["small.npy"]


def test_temporary_file_of_a_killed_worker_is_not_in_the_output(tmp_path: Path) -> None:
    def body(context: StageContext) -> None:
        Counting()(context)
        (context.directory / "1.txt.5a.tmp").write_text("half")

    whole = stage(tmp_path / "whole", Counting())
    assert stage(tmp_path / "out", body).files == whole.files
    assert not (tmp_path / "out" / "1.txt.5a.tmp").exists()


def test_link_makes_a_hard_link_or_else_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"whole")
    for name in ("linked", "linked"):  # twice: as after a kill
        link(source, tmp_path / name)
    assert (tmp_path / "linked").stat().st_ino == source.stat().st_ino

    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_bytes() == b"whole" and (tmp_path / "copied").stat().st_ino != source.stat().st_ino
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copied", "linked", "source"]


def test_scratch_files_are_removed_and_not_in_the_output(tmp_path: Path) -> None:
    def body(context: StageContext) -> None:
        (context.scratch / "chunk.bin").write_bytes(b"half")
        (context.directory / "out.txt").write_text("whole")

    assert stage(tmp_path / "out", body).files.keys() == {"out.txt"}
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != "manifest.json"] == ["out.txt"]


def test_attempt_killed_while_cleaning_up_is_not_run_again_and_keeps_its_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def body(context: StageContext) -> None:
        calls.append(1)
        context.record(documents=3)
        context.flops, context.device = 7.0, "somewhere"
        (context.scratch / "chunk.bin").write_bytes(b"half")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sbp_fast.pipeline.stage.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path / "out", body)
    manifest = stage(tmp_path / "out", body)
    assert calls == [1]
    assert (manifest.counts, manifest.flops, manifest.device) == ({"documents": 3}, 7.0, "somewhere")
    assert manifest.files == {}


@pytest.mark.parametrize(("error", "stays"), [(UserError, False), (TransientError, True)])
def test_scratch_files_go_after_a_user_error_and_stay_after_a_transient_error(
    tmp_path: Path, error: type[UserError], stays: bool
) -> None:
    def body(context: StageContext) -> None:
        (context.scratch / "chunk.bin").write_bytes(b"half")
        raise error("input", "is wrong", "correct it")

    with pytest.raises(error):
        stage(tmp_path / "out", body)
    assert (tmp_path / "out.partial").exists() == stays
