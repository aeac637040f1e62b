"""The self-check of the forwards for Hopper: what refuses them, with fake devices and kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sbp_kernels.attention import hopper, self_check
from sbp_kernels.layout import plan
from torch import Tensor

CPU = torch.device("cpu")
FORM = (torch.device("cuda", 0), 64, torch.bfloat16, 128, 64)
Results = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "CHECKED_TREE", ([9, 4, 3], [-1, 0, 0]))
    monkeypatch.setattr(self_check, "CHECKED_HEADS", (2, 1, 1))
    monkeypatch.setattr(plan, "SLOTS", 8)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every CUDA device is a Hopper GPU; the forms that were checked, each of which passes."""
    checked: list[tuple[Any, ...]] = []

    def passes(forward: object, form: tuple[Any, ...]) -> None:
        checked.append(form)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(self_check.triton, "__version__", "3.6.0")
    monkeypatch.setattr(self_check, "find_fault", passes)
    monkeypatch.setattr(self_check, "_FAULTS", {})
    return checked


def changed(change: Callable[[int, Results], Results]) -> Callable[..., Results]:
    """A kernel whose results the function changes by the number of the call."""
    calls = 0

    def run(*arguments: Any) -> Results:
        nonlocal calls
        calls += 1
        return change(calls, hopper.launch(*arguments))

    return run


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda call, results: results, None),
        (lambda call, results: (results[0] + (call == 3) * 2.0**-20, results[1]), "its results differ within 2 repeats"),
        (lambda call, results: (results[0], results[1] + (call == 3)), "its results differ within 2 repeats"),
        (lambda call, results: (results[0] * float("nan"), results[1]), "its results differ within 2 repeats"),
        (lambda call, results: (results[0] * 1.5, results[1]), "its results differ from the plain kernel's by 0.5"),
    ],
    ids=["none", "one bit of out", "one value of lse", "NaN", "the same wrong results"],
)
def test_fault_of_a_kernel_is_found(change: Callable[[int, Results], Results], fault: str | None) -> None:
    assert self_check.find_fault(changed(change), (CPU, 16, torch.float32, 16, 16), repeats=2) == fault


def test_check_runs_once_for_each_form(on_hopper: list[tuple[Any, ...]]) -> None:
    for form in (FORM, FORM, (*FORM[:3], 64, 32), FORM):
        self_check.check("triton-hopper", hopper.launch, form, "3.6")
    assert on_hopper == [FORM, (*FORM[:3], 64, 32)]


def test_check_that_failed_refuses_every_later_call(on_hopper: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "find_fault", lambda *_: "its results differ within 1000 repeats")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"failed its self-check on cuda:0: its results differ .*: use backend 'triton'"):
            self_check.check("triton-hopper", hopper.launch, FORM, "3.6")


def test_check_is_refused_while_a_graph_is_captured(on_hopper: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="call it once before a CUDA graph is captured"):
        self_check.check("triton-hopper", hopper.launch, FORM, "3.6")
    self_check._FAULTS["triton-hopper", FORM] = None
    self_check.check("triton-hopper", hopper.launch, FORM, "3.6")
    assert not on_hopper


@pytest.mark.parametrize(("capability", "release"), [((8, 0), "3.6.0"), ((9, 0), "3.9.0")])
def test_check_elsewhere_says_what_is_needed(
    capability: tuple[int, int], release: str, on_hopper: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(self_check.triton, "__version__", release)
    with pytest.raises(ValueError, match=r"needs a Hopper GPU and triton 3\.6: use backend 'triton'"):
        self_check.check("triton-hopper", hopper.launch, FORM, "3.6")


def test_check_without_a_release_takes_any(on_hopper: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check.triton, "__version__", "3.9.0")
    self_check.check("gluon-hopper", hopper.launch, FORM)
    assert on_hopper == [FORM]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="backend 'gluon-hopper' needs a Hopper GPU: use backend 'triton'"):
        self_check.check("gluon-hopper", hopper.launch, FORM)
