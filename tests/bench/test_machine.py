"""The machine of a benchmark, as far as programs that it may lack go."""

from pathlib import Path

import pytest

from bench import machine


def test_environment_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert len(machine.environment()["commit"]) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.environment()["commit"] == ""
