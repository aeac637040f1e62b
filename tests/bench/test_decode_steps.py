"""The benchmark of decode steps: every row samples every step, and one step is replayed where the documents stand."""

import re
from dataclasses import replace

import pytest

from bench import decode_steps
from bench.first_light import ITEMS
from bench.records import title
from bench.runner import measure


@pytest.mark.slow
def test_case_of_the_first_minutes_is_right_and_times_a_step_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_steps, "REPLAYS", 2)
    case = next(decode_steps.decode_steps())
    _, _, _, *options = next(item.command for item in ITEMS if item.name == "decode step by kernel")
    assert re.search(options[options.index("--case") + 1], title({"shape": case.shape}))
    row = measure(replace(case, providers={"ours": case.providers["ours"]}))
    assert row["check"]["right"] and row["work"] == 16 * 8
    assert row["statistics"]["ours: ms of a step"] > 0


def test_kernels_of_a_run_without_a_gpu_are_none() -> None:
    assert decode_steps.kernel_milliseconds(lambda: pytest.fail("ran"), 1) == {}
