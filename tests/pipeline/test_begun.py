"""A begun stage: what an earlier attempt left is accepted as it was written, or named."""

from pathlib import Path
from typing import Any

import pytest
from recording_console import RecordingConsole

from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import atomic_open
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.seals import begins_whole, fingerprint_file, is_sealed, read_marker, remove_sealed, seal, write_marker
from sbp_fast.pipeline.stage import StageContext, run_stage


def stage(out: Path, *, killed: bool = False, console: Console | None = None, force: bool = False) -> Manifest:
    def body(context: StageContext) -> None:
        for name in ("a", "b"):
            path = context.directory / name
            if not is_sealed(path):
                with atomic_open(path) as file:
                    file.write(name.encode() * 100)
                seal(path)
        context.save_clock()
        if killed:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"config": {"size": 1}, "inputs": {}, "console": console or RecordingConsole()}
    return run_stage("count", out, body=body, force=force, **options)


def begin(folder: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        stage(folder / "out", killed=True)
    return folder / "out.partial"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["a", "b", "a.seal.json"])
def test_damaged_file_of_a_begun_stage_is_named_and_made_again(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = stage(tmp_path / "whole")
    flip(begin(tmp_path) / name)
    assert stage(tmp_path / "out").files == whole.files
    assert f"out.partial/{name}: missing or damaged" in capsys.readouterr().out


def test_damaged_plan_is_refused_unless_forced(tmp_path: Path) -> None:
    flip(begin(tmp_path) / "plan.json")
    with pytest.raises(UserError, match=r"plan\.json: missing or damaged.*--force"):
        stage(tmp_path / "out")
    assert stage(tmp_path / "out", force=True).files.keys() == {"a", "b"}


def test_begun_work_without_its_plan_is_refused_not_removed(tmp_path: Path) -> None:
    partial = begin(tmp_path)
    (partial / "plan.json").unlink()
    with pytest.raises(UserError, match=r"plan\.json: missing"):
        stage(tmp_path / "out")
    assert (partial / "a").exists()


def test_damaged_clock_is_named_and_passed_over(tmp_path: Path) -> None:
    flip(begin(tmp_path) / "clock.json")
    console = RecordingConsole()
    assert stage(tmp_path / "out", console=console).seconds < 100
    assert "clock.json: missing or damaged" in console.lines[0]


@pytest.mark.parametrize("name", ["a", "complete.json"])
def test_output_damaged_after_the_body_is_refused_and_not_sealed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sbp_fast.pipeline.stage.shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path / "out")
    flip(tmp_path / "out.partial" / name)
    with pytest.raises(UserError, match=f"{name}: missing or damaged"):
        stage(tmp_path / "out")
    assert stage(tmp_path / "out", force=True).files.keys() == {"a", "b"}


def test_marker_counts_only_with_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/b").write_bytes(b"2")
    marker = tmp_path / "folder/done.json"
    write_marker(marker, [tmp_path / "a", tmp_path / "folder/b"], rows=3)
    assert read_marker(marker) == {"rows": 3}
    (tmp_path / "a").write_bytes(b"2")
    assert read_marker(marker) is None and not marker.exists()
    seal(tmp_path / "a")
    remove_sealed(tmp_path / "a")
    assert not is_sealed(tmp_path / "a") and [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_file_that_grew_still_begins_whole_and_a_changed_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("one\n")
    begin = fingerprint_file(path)
    path.write_text("one\ntwo\n")
    assert begins_whole(path, begin)
    path.write_text("onE\ntwo\n")
    assert not begins_whole(path, begin)
