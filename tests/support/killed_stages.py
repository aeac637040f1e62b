"""Run stages of a finished run, each in a forked process that is killed after a number of durable writes.

python killed_stages.py RUN; then a line STAGE OUT WRITES on standard input for each, answered by a line with the signal or 0.
"""

import os
import signal
import sys
from pathlib import Path

from interrupted_stage import signal_after

from sbp_fast.config.files import load_config
from sbp_fast.experiment.graph import Step, stages_of
from sbp_fast.experiment.report.page import write_report  # noqa: F401  (imports what a stage may need, once for all)
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages import evaluate, quality, synthesize, train  # noqa: F401


def main(directory: Path) -> None:
    config = load_config([str(directory / "config.toml")])
    for line in sys.stdin:
        name, out, writes = line.split()
        child = os.fork()  # no thread has been started here
        if child == 0:
            signal_after(int(writes), signal.SIGKILL)
            stage = stages_of(config)[name]
            inputs = {key: directory / source for key, source in stage.inputs.items()}
            stage.run(Step(stage.config, Path(out), inputs, Console(quiet=True)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
