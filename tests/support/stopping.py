"""Run `sbp-fast` and send it a stop signal in a given step: python stopping.py STEP COMMAND..."""

import os
import signal
import sys

from sbp_fast.cli import main
from sbp_fast.train import loop

if __name__ == "__main__":
    step = int(sys.argv.pop(1))
    real_step = loop.Training.step

    def stopping(self: loop.Training, number: int, *given: object) -> None:
        real_step(self, number, *given)
        if number == step and os.environ.get("RANK", "0") == "1":  # one of the processes hears of it
            signal.raise_signal(signal.SIGTERM)

    loop.Training.step = stopping
    main()
