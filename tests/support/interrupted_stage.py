"""Run one stage as the command line does, and send this process signals after a number of durable writes.

python interrupted_stage.py RUN STAGE OUT SIGNAL WRITES
"""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sbp_fast.cli import run_command
from sbp_fast.config.files import load_config
from sbp_fast.experiment.graph import Step, stages_of
from sbp_fast.pipeline.progress import Console


def signal_after(writes: int, number: int) -> None:
    """Send this process a signal after so many renames and unbuffered writes into files."""
    lock, done = threading.Lock(), 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal done
            result = function(*arguments)
            with lock:
                done += 1
                due = done == writes
            if due:
                os.kill(os.getpid(), number)
            return result

        return call

    os.replace = counted(os.replace)


def main(directory: Path, name: str, out: Path, number: int, writes: int) -> None:
    config = load_config([str(directory / "config.toml")])
    stage = stages_of(config)[name]
    inputs = {key: directory / source for key, source in stage.inputs.items()}
    step = Step(stage.config, out, inputs, Console())
    signal_after(writes, number)
    run_command(lambda: stage.run(step))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
