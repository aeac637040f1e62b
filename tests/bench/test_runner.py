"""The runner: wrong answers get no speed, and providers are timed as the schedule says."""

from dataclasses import replace

import pytest
import torch

from bench import __main__ as command
from bench import machine, registry, runner
from bench.case import MINUTES_A_RUN, Case, Prepared, Provider, Schedule, Tensors, no_inputs, no_results
from bench.runner import TIME_OVER
from bench.worker import Request, chosen


@pytest.fixture(autouse=True)
def fixed_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "roofline", lambda: {"flops": 1e11, "bytes": 1e10})


def addition(error: float, *, library: Provider | None = None) -> Case:
    """A case whose first provider errs by `error`, and plain torch by 1e-3."""

    def off_by(distance: float) -> Provider:
        return lambda tensors: Prepared(lambda: {"out": tensors["x"] + distance})

    providers = {"ours": off_by(error), "plain": off_by(1e-3)} | ({"library": library} if library else {})
    exact = lambda tensors: {"out": tensors["x"].double()}  # noqa: E731
    inputs = lambda generator: {"x": torch.randn(100, generator=generator)}  # noqa: E731
    return Case(
        {"size": 100}, inputs, providers, exact, work=100, unit="numbers", flops=1e6, baselines=("plain",), schedule=FIVE_ROUNDS
    )


FIVE_ROUNDS = Schedule(rounds=5)


def test_measure_of_a_wrong_provider_shows_errors_and_no_speed() -> None:
    right, wrong = runner.measure(addition(1.9e-3)), runner.measure(addition(2.1e-3))
    assert right["check"]["right"] and set(right["seconds"]) == {"ours", "plain"} and right["rounds"] == 5
    assert not wrong["check"]["right"] and "seconds" not in wrong
    assert wrong["check"]["errors"]["ours"]["out"] == pytest.approx(2.1e-3, rel=1e-3)


def test_measure_of_a_failed_verification_shows_no_speed() -> None:
    verdict = {"right": False, "errors": {"log-probability": 1.0}}
    case = Case({}, no_inputs, {"ours": lambda _: Prepared(int)}, None, work=1, unit="runs", verify=lambda: verdict)
    row = runner.measure(case)
    assert row["check"] == verdict and "seconds" not in row


@pytest.mark.parametrize("error", [ImportError("No module named 'library'"), RuntimeError("No module named 'library'")])
def test_measure_with_a_provider_that_fails_records_the_reason(error: Exception) -> None:
    def absent(tensors: Tensors) -> Prepared:
        raise error

    assert runner.measure(addition(1e-3, library=absent))["left_out"] == {"library": "No module named 'library'"}


def test_measure_with_a_provider_that_disagrees_records_the_difference() -> None:
    row = runner.measure(addition(1e-3, library=lambda tensors: Prepared(lambda: {"out": 2 * tensors["x"]})))
    assert row["left_out"]["library"].startswith("differs from ours by") and set(row["seconds"]) == {"ours", "plain"}


def test_measure_with_our_provider_failing_records_the_reason_and_no_speed() -> None:
    def absent(tensors: Tensors) -> Prepared:
        raise ValueError("ours cannot run")

    row = runner.measure(Case({}, no_inputs, {"ours": absent}, None, work=1, unit="runs"))
    assert row["failed"] == "ours cannot run" and not row["check"]["right"] and "seconds" not in row


class CompilationFailed(Exception):
    """Not a RuntimeError, as little as what Triton's compiler raises."""


def test_measure_with_a_provider_that_fails_while_it_is_timed_leaves_it_out() -> None:
    runs = iter(range(100))

    def tires(tensors: Tensors) -> Prepared:
        def run() -> Tensors:
            if next(runs) > 6:  # prepared three times, compared, measured, timed twice
                raise CompilationFailed
            return {"out": tensors["x"]}

        return Prepared(run)

    row = runner.measure(addition(1e-3, library=tires))
    assert row["left_out"] == {"library": "CompilationFailed"} and set(row["seconds"]) == {"ours", "plain"}
    assert row["rounds"] == 5


def test_measure_announces_each_step_and_does_not_run_what_is_left_out() -> None:
    steps: list[tuple[str, str]] = []
    case = addition(1e-3, library=lambda tensors: Prepared(lambda: {"out": tensors["x"]}))
    row = runner.measure(case, watch=lambda *step: steps.append(step), left_out={"library": "hangs"})
    assert row["left_out"] == {"library": "hangs"} and set(row["seconds"]) == {"ours", "plain"}
    turn = [("ours", "time"), ("plain", "time")] * 5
    before = [(name, step) for step in ("prepare", "check", "prepare", "compare", "memory") for name in ("ours", "plain")]
    assert steps == before + turn


def test_measure_with_a_provider_that_breaks_the_context_raises_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(tensors: Tensors) -> Prepared:
        def unusable() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(machine, "synchronize", unusable)
        raise RuntimeError("illegal memory access in their kernel")

    with pytest.raises(runner.DeviceLost, match="in their kernel") as lost:
        runner.measure(addition(1e-3, library=breaks))
    assert lost.value.provider == "library"


def test_check_without_a_baseline_that_runs_raises() -> None:
    def fails(tensors: Tensors) -> Prepared:
        raise RuntimeError("out of memory")

    case = addition(1e-3)
    row = runner.measure(replace(case, providers={**case.providers, "plain": fails}))
    assert row["failed"] == "no baseline ran: {'plain': 'out of memory'}"


def test_measure_without_warm_up_runs_each_provider_three_times_and_compares_nothing() -> None:
    runs, recall = [], {}

    def counted(tensors: Tensors) -> Prepared:
        recall["found"] = 0.99
        return Prepared(lambda: runs.append(1))

    def poor(tensors: Tensors) -> Prepared:
        raise ValueError("finds 0.9 of the pairs at most")

    inputs = lambda generator: {"x": torch.zeros(1)}  # noqa: E731
    providers = {"ours": counted, "poor": poor}
    case = Case({"size": 1}, inputs, providers, None, 1, "pairs", statistics=recall, schedule=MINUTES_A_RUN)
    row = runner.measure(case)
    assert len(runs) == row["rounds"] == 3 and row["statistics"] == {"found": 0.99}
    assert row["left_out"] == {"poor": "finds 0.9 of the pairs at most"} and set(row["seconds"]) == {"ours"}


def logged(log: list[str], name: str, seconds: float) -> Provider:
    """A provider that logs what is done with it, and whose runs take `seconds` of the clock `fake_clock`."""

    def provider(_: Tensors) -> Prepared:
        log.append(f"prepare {name}")

        def run() -> float:
            log.append(f"run {name}")
            return seconds

        def close() -> None:
            log.append(f"close {name}")

        return Prepared(run, no_results, work=lambda _: 1 / seconds, statistics=lambda each: {"each": each}, close=close)

    return provider


def test_measure_of_providers_alone_prepares_and_closes_each_in_every_round() -> None:
    log: list[str] = []
    schedule = Schedule(rounds=2, min_rounds=1, warm_up=1, repeats=2, alone=True, once=("slow",))
    ticks = iter(float(tick) for tick in range(1000))
    providers = {"ours": logged(log, "ours", 1.0), "slow": logged(log, "slow", 4.0)}
    case = Case({}, no_inputs, providers, None, 1, "tokens", clock=lambda: next(ticks), schedule=schedule)
    saved: list[list[str]] = []
    row = runner.measure(case, save=lambda row: saved.append([*row["seconds"]]))
    assert saved == [["ours"], ["ours", "slow"], ["ours", "slow"], ["ours", "slow"]]
    turn = ["prepare {}", "run {}", "run {}", "run {}", "close {}"]
    assert log == [line.format(name) for name in ("ours", "slow", "ours") for line in turn]
    # a tick a run; the slow one does a quarter of the work in it
    assert row["seconds"]["ours"] == [1, 1, 1] and row["seconds"]["slow"] == [4, 4, 4] and row["speed_up"]["slow"] == [4, 4, 4]
    assert row["statistics"] == {"ours: each": 1.0, "slow: each": 4.0} and row["rounds"] == 4


def test_measure_of_providers_alone_without_time_left_times_ours_only() -> None:
    log: list[str] = []
    providers = {"ours": logged(log, "ours", 1.0), "slow": logged(log, "slow", 4.0)}
    row = runner.measure(Case({}, no_inputs, providers, None, 1, "tokens", schedule=Schedule(min_rounds=1, alone=True)), -1.0)
    assert set(row["seconds"]) == {"ours"} and row["left_out"] == {"slow": TIME_OVER} and "prepare slow" not in log


def test_measure_of_providers_alone_closes_one_that_fails() -> None:
    log: list[str] = []

    def failing(_: Tensors) -> Prepared:
        def run() -> None:
            raise RuntimeError("out of pages")

        return Prepared(run, close=lambda: log.append("closed"))

    providers = {"ours": logged([], "ours", 1.0), "failing": failing}
    row = runner.measure(Case({}, no_inputs, providers, None, 1, "tokens", schedule=Schedule(rounds=1, alone=True)))
    assert row["left_out"] == {"failing": "out of pages"} and log == ["closed"]


def test_chosen_cases_match_the_pattern_with_the_named_providers_and_the_whole_check() -> None:
    cases = [addition(error) for error in (1e-3, 1.0)] + [replace(addition(0.0), shape={"size": 7})]
    (index, case), *others = chosen(iter(cases), Request("", pattern="size 100", providers=("plain",), first=1))
    assert index == 1 and not others and set(case.providers) == {"plain"}
    assert case.check is cases[1]
    assert not list(chosen(iter(cases), Request("", providers=("absent",))))


def test_command_with_an_unknown_name_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["speed"])
    assert "unknown benchmark 'speed': choose from attention, generation," in capsys.readouterr().err


def test_register_with_a_name_that_is_taken_raises() -> None:
    with pytest.raises(ValueError, match="benchmark 'loss' is registered already"):
        registry.register("loss", "elsewhere:cases")
