"""Timing on a device: what is recorded around which launches, on a device of the test's own."""

import pytest
import torch

from bench import machine, runner, timing
from bench.case import Case, Prepared, Schedule, no_results
from bench.timing import MOST_LAUNCHES, Pace


class Device:
    """A device whose runs take `seconds` each, and the log of what it was given."""

    def __init__(self, seconds: float, late: bool = False) -> None:
        self.seconds, self.late, self.log = seconds, late, []
        self.clock = 0.0

    def run(self, name: str) -> str:
        self.log.append(name)
        self.clock += self.seconds
        return name

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)

    def spin(self, cycles: int) -> None:
        self.log.append(f"spin {cycles}")
        self.clock += 1000.0  # that no event may count


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.device.log.append("record")
        self.time = self.device.clock

    def query(self) -> bool:
        return self.device.late

    def synchronize(self) -> None:
        self.device.log.append("wait")

    def elapsed_time(self, stop: "Event") -> float:
        return 1e3 * (stop.time - self.time)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device(0.004)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "_sleep", device.spin)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: device.log.append("idle"))
    return device


def test_queue_spins_first_and_times_its_launches_alone_on_inputs_in_turn(cuda: Device) -> None:
    seconds, late, output = timing.queued_seconds([lambda: cuda.run("a"), lambda: cuda.run("b")], Pace(3, 0.001))
    assert cuda.log == ["idle", "spin 2000000", "record", "a", "b", "a", "record", "wait"]
    assert seconds == pytest.approx(0.004) and not late and output == "a"


def test_queue_whose_spin_ended_before_the_launches_were_queued_is_late(cuda: Device) -> None:
    cuda.late = True
    assert timing.queued_seconds([lambda: cuda.run("a")], Pace(1, 0.0))[1]


@pytest.mark.parametrize(("seconds", "launches"), [(1e-7, MOST_LAUNCHES), (0.004, 5), (3.0, 1)])
def test_pace_fills_a_queue_with_at_least_one_launch(cuda: Device, seconds: float, launches: int) -> None:
    cuda.seconds = seconds
    pace = timing.choose_pace(lambda: cuda.run("a"))
    assert pace.launches == launches and 0 < pace.spin <= timing.MOST_SPIN_SECONDS


def test_measure_on_a_device_times_queues_and_counts_the_late_ones(cuda: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(machine, "roofline", lambda: {"flops": 1e11, "bytes": 1e10})
    for name in ("settle", "synchronize", "reset_peak_memory"):
        monkeypatch.setattr(machine, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    providers = {name: lambda _, name=name: Prepared(lambda: cuda.run(name), no_results) for name in ("ours", "other")}
    inputs = lambda generator: {"x": torch.zeros(1)}  # noqa: E731
    row = runner.measure(Case({}, inputs, providers, None, work=1, unit="runs", schedule=Schedule(rounds=2)))
    assert row["seconds"]["ours"] == pytest.approx([0.004] * 3) and row["late_queues"] == {"ours": 0, "other": 0}
    cuda.late = True
    assert runner.measure(Case({}, inputs, providers, None, 1, "runs", schedule=Schedule(rounds=2)))["late_queues"] == {
        "ours": 2,
        "other": 2,
    }
