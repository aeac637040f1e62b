import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sbp_fast.config import RunConfig
from sbp_fast.errors import TransientError, UserError
from sbp_fast.pipeline.executors.choose import open_workers
from sbp_fast.pipeline.executors.executor import Advance, Placement
from sbp_fast.pipeline.executors.local import LOCAL

ENDLESS = """
import os, sys, time
from sbp_fast.pipeline.executors.local import LOCAL

def sleep(number):
    print(os.getpid(), flush=True)
    time.sleep(1000)

if __name__ == "__main__":
    list(LOCAL.run(sleep, [1, 2], 2))
"""


def square(number: int) -> int:
    time.sleep(0.2 * (number == 1))
    if number < 0:
        raise UserError(number, "is negative", "give a positive number")
    return number * number


def fail_or_sleep(seconds: int) -> None:
    if not seconds:
        raise UserError(seconds, "is nothing", "give more")
    time.sleep(seconds)


def leave(number: int) -> None:
    os._exit(number)


@pytest.mark.parametrize("workers", [1, 2])
def test_local_workers_return_results_in_order(workers: int) -> None:
    assert list(LOCAL.run(square, [1, 2, 3, 4, 5], workers)) == [1, 4, 9, 16, 25]
    assert list(LOCAL.run(square, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_failed_task_raises_the_first_error_and_ends_all_workers(workers: int) -> None:
    results: list[int] = []
    with pytest.raises(UserError) as caught:
        for result in LOCAL.run(square, [1, -2, -3, *range(100)], workers):
            results.append(result)
    assert results == [1] and (caught.value.where, caught.value.remedy) == ("-2", "give a positive number")
    assert not multiprocessing.active_children()


def test_failed_task_raises_without_waiting_for_running_tasks() -> None:
    begun = time.monotonic()
    with pytest.raises(UserError):
        list(LOCAL.run(fail_or_sleep, [0, 1000], 2))
    assert time.monotonic() - begun < 500


def test_killed_worker_is_a_transient_error_of_one_line() -> None:
    with pytest.raises(TransientError, match="worker processes: one was killed, most likely for want of memory"):
        list(LOCAL.run(leave, [3, 3], 2))


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(200):
        if not any(alive(worker) for worker in workers):
            return
        time.sleep(0.05)
    pytest.fail("workers outlived their parent")


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_local_tool_is_opened_once_by_the_first_task() -> None:
    opened, advanced = [], []

    def make(placement: Placement) -> int:
        opened.append(placement)
        return 10

    def work(tool: int, task: int, advance: Advance) -> int:
        advance(task)
        return tool * task

    with LOCAL.hold(make, RunConfig(device="cpu", threads=3)) as holders:
        assert (holders.count, holders.placement) == (1, Placement("cpu", 3))
        assert list(holders.run(work, [], advanced.append)) == opened == []
        assert list(holders.run(work, [1, 2], advanced.append)) == [10, 20] and list(holders.run(work, [3], print)) == [30]
    assert opened == [Placement("cpu", 3)] and advanced == [1, 2]


def test_open_workers_refuses_unknown_engines_and_imports_ray_only_when_chosen() -> None:
    with open_workers("local", None) as workers:
        assert workers is LOCAL
    for engine, address, message in [
        ("local", "auto", "--address auto: goes with --engine ray; give that"),
        ("slurm", None, "--engine slurm: is no engine; give local or ray"),
    ]:
        with pytest.raises(UserError, match=message), open_workers(engine, address):
            pass
    script = (
        "import sys; import sbp_fast.cli, sbp_fast.experiment.run\n"
        "from sbp_fast.pipeline.executors.choose import open_workers\n"
        "with open_workers('local', None): assert not any(name.split('.')[0] == 'ray' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_engine_ray_without_ray_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "sbp_fast.pipeline.executors.ray", raising=False)
    remedy = r"--engine ray: Ray is not installed; run: pip install 'sbp-fast\[ray\]'"
    with pytest.raises(UserError, match=remedy), open_workers("ray", "auto"):
        pass
