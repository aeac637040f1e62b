"""Figures that people read."""

import pytest

from sbp_fast.pipeline.progress import Console, duration, short


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (12_345, "12.3k"),
        (1_000_000, "1M"),
        (4_560_000, "4.56M"),
        (123_456, "123k"),
        (999_700, "1M"),
        (2.74e9, "2.74B"),
        (7.8e17, "7.80e+17"),
    ],
)
def test_short_gives_about_three_digits(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(8.2, "8s"), (65, "1m05s"), (59.7, "1m00s"), (7980, "2h13m")])
def test_duration_gives_seconds_minutes_or_hours(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plain_progress_prints_the_share_done_and_ends_with_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(force_plain=True)
    with console.stage("2/11 base"), console.task("training", 200, "tokens", done=100) as task:
        task.advance(50, note="loss 4.20")
        status = task.status()
    assert status.startswith("75%, 150/200 tokens, ")
    assert status.endswith("left, loss 4.20")
    assert "[2/11 base] training: 150 tokens in 0s, loss 4.20" in capsys.readouterr().out
