"""The supervisor: a provider that ends its process is left out from there on, and nothing else is lost."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import registry, supervisor
from bench.records import load
from bench.supervisor import Event, Supervision, WorkerLost
from bench.worker import Request

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`registry.register` on a copy of the registry, with the tests' modules in reach of workers."""
    monkeypatch.setattr(registry, "BENCHMARKS", dict(registry.BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    monkeypatch.setenv("BENCH_TINY", "1")
    return registry.register


def test_command_with_providers_that_die_measures_the_others(
    register: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register("samples", "bench_samples:cases")
    assert command.main(["samples", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*/samples.json")
    first, second, third = load(path)["cases"]
    assert set(first["seconds"]) == {"ours", "plain"}
    reason = first["left_out"]["dies"]
    assert "ended the process in step 'prepare' of size 100: killed by SIGABRT" in reason and "about to die" in reason
    assert not second["check"]["right"] and "failed" not in second
    assert third["failed"].startswith("ours ended the process in step 'prepare' of size 300: killed by SIGABRT")
    output = capsys.readouterr().out
    assert "speed-up" in output and "WRONG against the reference" in output and "FAILED: ours ended" in output
    assert str(path) in output


def test_command_without_a_package_that_a_benchmark_needs_names_it(
    register: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register("absent", "no_such_package:cases")
    assert command.main(["absent", "--out", str(tmp_path)]) == 1
    assert "absent left out: No module named 'no_such_package'" in capsys.readouterr().out


def row(**values: Any) -> dict[str, Any]:
    return {"shape": {"size": 1}, "left_out": {}, "check": {"right": True}, **values}


def begun(case: int, **values: Any) -> Event:
    return {"case": case, "row": row(**values), "providers": ["ours", "a", "b"], "done": False}


def step(case: int, provider: str) -> Event:
    return {"case": case, "provider": provider, "step": "run"}


def supervised(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *processes: list[Event | Exception]
) -> tuple[list[Request], dict[int, Any]]:
    """Requests to processes that send these events, and the rows in the end."""
    requests: list[Request] = []
    scripts = iter(processes)

    def events(request: Request, step_seconds: float) -> Iterator[Event]:
        requests.append(request)
        yield {"environment": {"device": "a device"}}
        for event in next(scripts):
            if isinstance(event, Exception):
                raise event
            yield event

    monkeypatch.setattr(supervisor, "worker_events", events)
    supervision = Supervision("samples", folder, lambda row: None)
    supervision.run(Request("bench_samples:cases", seconds=100.0))
    return requests, supervision.rows


def test_run_after_a_lost_provider_repeats_the_case_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = [
        begun(0),
        {**begun(0, seconds={}), "done": True},
        begun(1),
        step(1, "ours"),
        step(1, "a"),
        {"lost": "illegal access"},
    ]
    requests, _ = supervised(monkeypatch, tmp_path, first, [begun(1), {"end": True}])
    assert [request.first for request in requests] == [0, 1]
    assert requests[1].left_out == {"a": "ended the process in step 'run' of size 1: illegal access"}


def test_run_after_a_lost_provider_of_providers_alone_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = [begun(0), step(0, "ours"), begun(0, seconds={"ours": [1, 1, 1]}), step(0, "a"), WorkerLost("killed")]
    requests, rows = supervised(monkeypatch, tmp_path, first, [{"end": True}])
    assert requests[1].first == 1 and rows[0]["seconds"] == {"ours": [1, 1, 1]}
    ended = "ended the process in step 'run' of size 1: killed"
    assert rows[0]["left_out"] == {"a": ended, "b": f"not reached: a {ended}"}


def test_run_after_ours_was_lost_goes_on_with_the_next_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requests, rows = supervised(monkeypatch, tmp_path, [begun(0), step(0, "ours"), WorkerLost("killed")], [{"end": True}])
    assert requests[1].first == 1 and not requests[1].left_out
    assert rows[0]["failed"] == "ours ended the process in step 'run' of size 1: killed" and not rows[0]["check"]["right"]


def test_run_of_processes_that_die_before_a_case_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(WorkerLost, match="exit code 1"):
        supervised(monkeypatch, tmp_path, [WorkerLost("exit code 1")])


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('{\"case\": 0}', flush=True); import time; time.sleep(60)", "nothing within 2 seconds"),
        ("print('{\"case\": 0}'); import sys; sys.exit('no memory')", "exit code 1\nno memory"),
    ],
)
def test_worker_that_falls_silent_or_dies_is_lost(program: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, "-c", program))
    events = supervisor.worker_events(Request("a:b"), 2.0)
    assert next(events) == {"case": 0}
    with pytest.raises(WorkerLost) as lost:
        next(events)
    assert str(lost.value) == message
