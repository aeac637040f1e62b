"""A user's mistakes: exit code 2, one clear line that names the place and the remedy, nothing half-written."""

import gzip
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY

from sbp_fast.cli import main

RECORD = '{"text": "The treaty was signed in the spring and ratified before the year was out."}\n'


def sbp_fast(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Exit code and what was printed to standard error."""
    monkeypatch.setattr(sys, "argv", ["sbp-fast", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0), capsys.readouterr().err


def write(content: bytes, suffix: str = ".jsonl") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"input{suffix}"
        path.write_bytes(content)
        return path

    return make


CORPORA = {
    "missing": (lambda folder: folder / "none.jsonl", ["none.jsonl"]),
    "empty": (write(b""), ["input.jsonl", "no documents"]),
    "malformed": (write((RECORD * 2 + '{"text": "cut').encode()), ["input.jsonl", "line 3"]),
    "not an object": (write((RECORD + "[1, 2]\n").encode()), ["input.jsonl", "line 2"]),
    "no text": (write((RECORD + '{"body": "x"}\n').encode()), ["input.jsonl", "line 2", "text"]),
    "text is a number": (write(b'{"text": 5}\n'), ["input.jsonl", "line 1"]),
    "not UTF-8": (write(RECORD.encode() + b'{"text": "caf\xe9"}\n'), ["input.jsonl", "line 2", "UTF-8"]),
    "truncated gzip": (write(gzip.compress(RECORD.encode() * 50)[:-20], ".jsonl.gz"), ["input.jsonl.gz"]),
    "unknown kind": (write(b"x", ".docx"), ["input.docx"]),
    "too small": (write("".join(json.dumps({"text": f"Text {n}."}) + "\n" for n in range(8)).encode()), ["document"]),
}


@pytest.mark.parametrize("case", CORPORA)
def test_bad_corpus_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = CORPORA[case]
    out = tmp_path / "run"
    code, error = sbp_fast(capsys, monkeypatch, "run", "small", *TINY, f"corpus.path={make(tmp_path)}", "--out", str(out))
    assert (code, error.count("\n")) == (2, 1), error
    assert all(word in error for word in words), error
    assert not (out / "corpus").exists()


def test_bad_records_with_skip_are_listed_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "input.jsonl"
    path.write_text("not JSON\n" + "".join(json.dumps({"text": f"Text {number}."}) + "\n" for number in range(200)))
    arguments = ["prepare", "small", *TINY, f"corpus.path={path}", "--out", str(tmp_path / "corpus")]
    code, error = sbp_fast(capsys, monkeypatch, *arguments, "--on-error", "ignore")
    assert (code, error.count("\n")) == (2, 1) and "corpus.on_error = ignore" in error
    assert sbp_fast(capsys, monkeypatch, *arguments)[0] == 2
    assert sbp_fast(capsys, monkeypatch, *arguments, "--on-error", "skip") == (0, "")
    assert "line 1" in (tmp_path / "corpus/skipped.jsonl").read_text()


def test_impossible_export_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["export-tokens", str(tmp_path), "--to", "mds", "--out", str(tmp_path / "out")]
    code, error = sbp_fast(capsys, monkeypatch, *arguments)
    assert (code, error.count("\n")) == (2, 1) and "holds no token shards" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.hiden_size=3", ["model.hiden_size", "model.hidden_size"]),
        ("corpus.tokenizer=none.json", ["none.json"]),
        ("pair.similarity_low=0.999", ["pair.similarity_low"]),
        ("embed.model=/no/such/encoder", ["/no/such/encoder"]),
        ("evaluate.choices=none.jsonl", ["none.jsonl"]),
    ],
)
def test_bad_setting_is_refused_in_one_line(
    setting: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    code, error = sbp_fast(capsys, monkeypatch, "run", "small", *TINY, setting, "--out", str(out))
    assert (code, error.count("\n")) == (2, 1), error
    assert all(word in error for word in words), error
    assert not (out / "results.json").exists()


def test_unreadable_tokenizer_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": ')
    settings = [*TINY, f"corpus.tokenizer={path}"]
    code, error = sbp_fast(capsys, monkeypatch, "run", "small", *settings, "--out", str(tmp_path / "run"))
    assert (code, error.count("\n")) == (2, 1), error
    assert str(path) in error


def test_directory_of_another_run_is_refused_in_one_line(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, error = sbp_fast(capsys, monkeypatch, "run", "small", *TINY, "seed=5", "--out", str(tiny_run))
    assert (code, error.count("\n")) == (2, 1), error
    assert "seed: 0 -> 5" in error
    (tmp_path / "letter.txt").write_text("mine")
    code, error = sbp_fast(capsys, monkeypatch, "run", "small", *TINY, "--out", str(tmp_path))
    assert (code, error.count("\n")) == (2, 1), error
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_full_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    """A process that may write no file beyond 64 KiB meets the same error path as one on a full disk."""
    limit = 64 << 10

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "sbp_fast", "prepare", "small", *TINY, "--out", str(tmp_path / "corpus")]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, preexec_fn=small_files, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "cannot be written" in done.stderr
    assert not (tmp_path / "corpus").exists()
    assert not list(tmp_path.rglob("*.tmp"))
