"""Trackers, against stand-ins for the interfaces of their packages."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_training import configure, make_corpus, train_arm

from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import read_json
from sbp_fast.train import loop
from sbp_fast.train.trackers import open_trackers

Line = tuple[int, str, float]


class EventFiles:
    """Stands for tensorboard's SummaryWriter and for what a reader shows: a purge hides earlier metrics from its step on."""

    shown: list[Line] = []  # noqa: RUF012 - one of each test, see `event_files`
    directories: list[str] = []  # noqa: RUF012

    def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
        EventFiles.directories.append(log_dir)
        if purge_step is not None:
            EventFiles.shown = [line for line in EventFiles.shown if line[0] < purge_step]

    def add_scalar(self, key: str, value: float, step: int) -> None:
        EventFiles.shown.append((step, key, value))

    def close(self) -> None:
        pass


class Wandb(SimpleNamespace):
    """Stands for the package wandb: runs by id, which keep the first metrics of a step."""

    class Error(Exception):
        """As wandb.Error, the base of what wandb raises."""

    def __init__(self, refusal: str = "") -> None:
        self.calls: list[dict[str, Any]] = []
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.finished, self.refusal = 0, refusal

    def init(self, **options: Any) -> SimpleNamespace:
        if self.refusal:
            raise Wandb.Error(self.refusal)
        self.calls.append(options)
        lines = self.runs.setdefault(options["id"], {})
        last = max(lines, default=-1)

        def log(metrics: dict[str, float], step: int) -> None:
            if step > last:
                lines.setdefault(step, {}).update(metrics)

        def finish() -> None:
            self.finished += 1

        return SimpleNamespace(log=log, finish=finish)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trackers")
    make_corpus(directory)
    return directory


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(EventFiles, "shown", [])
    monkeypatch.setattr(EventFiles, "directories", [])

    def install(**packages: Any) -> None:
        for name, package in packages.items():
            monkeypatch.setitem(__import__("sys").modules, name.replace("__", "."), package)

    return install


def scalars(directory: Path) -> list[Line]:
    """Return the step, key and value of what is not null in metrics.jsonl; a step of a validation point has two lines."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], key, line[key]) for line in lines for key in line if key != "step" and line[key] is not None]


def metrics(directory: Path) -> dict[int, dict[str, float]]:
    """Return the metrics of each step in metrics.jsonl."""
    steps: dict[int, dict[str, float]] = {}
    for step, key, value in scalars(directory):
        steps.setdefault(step, {})[key] = value
    return steps


def without_clock(steps: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {
        step: {key: value for key, value in line.items() if not key.startswith("perf/")} for step, line in sorted(steps.items())
    }


def test_trackers_get_the_lines_of_metrics_jsonl(home: Path, tmp_path: Path, modules: Callable[..., None]) -> None:
    wandb = Wandb()
    modules(wandb=wandb)
    config = configure(home, "log.trackers=['wandb']", "quality.judge_url='https://user:password@host/v1?api_key=secret'")
    train_arm(config, tmp_path / "base", corpus=home / "corpus")
    (call,) = wandb.calls
    assert call["name"] == "base" and call["config"]["pretrain"]["tokens"] == 3072
    assert "password" not in str(call) and "secret" not in str(call)
    assert wandb.runs == {call["id"]: metrics(tmp_path / "base")} and wandb.finished == 1


def test_trackers_of_an_interrupted_and_resumed_training_hold_each_step_once_in_one_run(
    home: Path, tmp_path: Path, modules: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, real_step, calls = Wandb(), loop.train_step, iter(range(100))
    modules(wandb=wandb, torch__utils__tensorboard=SimpleNamespace(SummaryWriter=EventFiles))
    config = configure(home, "log.trackers=['tensorboard', 'wandb']", "checkpoint.seconds=1000")

    def step(*given: Any, **settings: Any) -> Any:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return real_step(*given, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        # the only checkpoint comes after the fourth step, so three steps are taken again
        patch.setattr(loop.Training, "is_time_to_save", lambda self, step, stop: step == 3)
        with pytest.raises(KeyboardInterrupt):
            train_arm(config, tmp_path / "base", corpus=home / "corpus")
    assert max(step for step, _, _ in EventFiles.shown) == 6
    train_arm(config, tmp_path / "base", corpus=home / "corpus")
    assert EventFiles.shown == scalars(tmp_path / "base")
    first, second = wandb.calls
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert without_clock(wandb.runs[first["id"]]) == without_clock(metrics(tmp_path / "base"))
    tracking = tmp_path / "base.tracking"
    assert first["dir"] == second["dir"] == str(tracking) and set(EventFiles.directories) == {str(tracking / "tensorboard")}
    assert read_json(tracking / "wandb-run.json") == {"id": first["id"]}


def test_a_training_from_its_beginning_is_a_new_run(tmp_path: Path, modules: Callable[..., None]) -> None:
    wandb, trackio = Wandb(), SimpleNamespace(init=lambda **options: resumed.append(options["resume"]))
    resumed: list[str] = []
    modules(wandb=wandb, trackio=trackio)
    for first_step in (0, 5, 0):
        open_trackers(["wandb", "trackio"], tmp_path / "tracking", "base", {}, first_step)
    first, second, third = (call["id"] for call in wandb.calls)
    assert first == second != third and resumed == ["never", "allow", "never"]


def test_a_tracker_without_a_login_is_refused_in_one_line_and_leaves_no_output(
    home: Path, tmp_path: Path, modules: Callable[..., None]
) -> None:
    modules(wandb=Wandb("api_key not configured (no-tty).\n Call wandb.login(key=[your_api_key])"))
    with pytest.raises(
        UserError, match=r"log\.trackers: wandb: cannot begin a run: .*; run `wandb login`, set WANDB_API_K"
    ) as caught:
        train_arm(configure(home, "log.trackers=['wandb']"), tmp_path / "base", corpus=home / "corpus")
    assert "\n" not in str(caught.value) and not (tmp_path / "base").exists()


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, modules: Callable[..., None]) -> None:
    modules(trackio=None)
    with pytest.raises(UserError, match=r"log\.trackers: trackio: cannot be used.*pip install trackio"):
        open_trackers(["trackio"], tmp_path, "base", {}, 0)
