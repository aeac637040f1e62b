"""The command `doctor`."""

import shutil
from collections.abc import Callable

import pytest
from rich.console import Console

from sbp_fast import doctor
from sbp_fast.config.files import load_config
from sbp_fast.train.trackers import TRACKERS


def printed(*arguments: object) -> str:
    console = Console(width=200, record=True)
    console.print(doctor.diagnose(*arguments))  # type: ignore[arg-type]
    return console.export_text()


def which(*names: str) -> Callable[[str], str | None]:
    return lambda name: f"/opt/{name}" if name in names else None


def test_every_tracker_and_optional_package_has_a_row() -> None:
    text = printed()
    assert all(name in text for name in (*TRACKERS, "lm-eval", "vllm", "GiB free here"))


def test_compiler_is_the_one_of_the_environment_or_a_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", which("clang++", "icpx"))
    monkeypatch.delenv("CXX", raising=False)
    assert "/opt/clang++" in printed()
    monkeypatch.setenv("CXX", "icpx")
    assert "/opt/icpx" in printed()


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", which())
    assert "none: parallel.compile" in printed()


def test_an_experiment_is_compared_with_free_memory_and_disk() -> None:
    small, large = (printed(load_config([name])) for name in ("small", "6b-1t"))
    assert "disk for small" in small and "enough" in small and "too little" not in small
    assert "too little" in large and "disk for 6b-1t" in large
