"""Around the training loop: prefetching, profiles, trackers, signals, the start of several processes."""

import gzip
import json
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import QUIET, configure, make_corpus, train_arm

from sbp_fast.config import RunConfig
from sbp_fast.errors import UserError
from sbp_fast.pipeline.distributed import Processes, run_on_rank0
from sbp_fast.pipeline.interrupts import Interrupted, StopRequest
from sbp_fast.pipeline.launcher import run_in_processes
from sbp_fast.train.data.batches import PackedBatch
from sbp_fast.train.data.prefetch import AHEAD, Prefetch
from sbp_fast.train.profile import parse_range

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tools")
    make_corpus(home)
    return home


class Numbered:
    """Packed sequences whose first token says which they are."""

    steps, sequences_per_step, sequence_tokens = 5, 4, 4

    def __init__(self) -> None:
        self.made: list[tuple[int, int, str]] = []

    def sequence(self, step: int, index: int) -> PackedBatch:
        if step == 4:
            raise OSError("the disk is gone")
        self.made.append((step, index, threading.current_thread().name))
        tokens = np.array([10 * step + index, 1, 1, 1])
        return PackedBatch.build(tokens, tokens, [4], length=4)


@pytest.mark.parametrize("rank", [0, 1])
def test_prefetch_makes_sequences_ahead_in_order_in_one_thread_and_raises_its_errors(rank: int) -> None:
    batches = Numbered()
    with Prefetch(batches, 1, device=CPU, rank=rank, world=2) as prefetch:
        assert prefetch.indices == range(2 * rank, 2 * rank + 2)
        for step in (1, 2, 3):
            read = [int(sequence.tokens[0]) for sequence in prefetch.step()]
            assert read == [10 * step + index for index in prefetch.indices]
        with pytest.raises(OSError, match="the disk is gone"):
            list(prefetch.step())
    assert [made[:2] for made in batches.made] == [(step, index) for step in (1, 2, 3) for index in prefetch.indices]
    assert {name for _, _, name in batches.made} == {"batches_0"}


def test_no_more_is_made_ahead_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Numbered()
    with Prefetch(batches, 0, device=CPU, rank=0, world=1) as prefetch:
        next(iter(prefetch.step()))
        time.sleep(0.2)
        assert len(batches.made) == AHEAD + 1
    assert prefetch.waited >= 0


def test_chosen_steps_are_traced(home: Path, tmp_path: Path) -> None:
    train_arm(configure(home), tmp_path / "base", corpus=home / "corpus", profile_steps="3:5")
    with gzip.open(tmp_path / "base.profile" / "trace.json.gz", "rt") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    assert sum(name == "Optimizer.step#AdamW.step" for name in names) == 2
    for text in ("5", "5:3", "a:b", "3:3"):
        with pytest.raises(UserError, match="write it as FIRST:LAST"):
            parse_range(text)


def test_first_signal_is_recorded_and_a_second_one_interrupts_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process is started to ignore it
    try:
        with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
            assert stop.signal_number == 0
            signal.raise_signal(signal.SIGTERM)
            assert stop.signal_number == signal.SIGTERM
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert signal.getsignal(signal.SIGTERM) is before


def test_signal_in_the_last_step_interrupts_after_the_block() -> None:
    with pytest.raises(Interrupted), StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("sbp_fast.pipeline.launcher.resolve_device", lambda config: "cuda")
    with pytest.raises(UserError, match="--gpus 2: asks for 2 processes, and there are 1 CUDA devices"):
        run_in_processes(print, RunConfig(), gpus=2, console=QUIET)


def test_other_ranks_end_when_rank_0_has_nothing_to_do_or_fails() -> None:
    broadcasts: list[object] = []

    class Rank0(Processes):
        def broadcast(self, message: object = None) -> object:
            broadcasts.append(message)
            return message

    rank0 = Rank0(0, 2, CPU)
    assert run_on_rank0(rank0, lambda announce: "done before", pytest.fail) == "done before"
    assert run_on_rank0(rank0, lambda announce: announce("work") or "done", pytest.fail) == "done"
    with pytest.raises(UserError):
        run_on_rank0(rank0, lambda announce: (_ for _ in ()).throw(UserError("a", "b", "c")), pytest.fail)
    assert broadcasts == [None, "work", None]
