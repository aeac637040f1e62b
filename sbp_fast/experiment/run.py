"""The whole experiment: every stage in the order the data flows, each done once, resumed after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sbp_fast.config import RunConfig, resolve_device
from sbp_fast.config.files import diff_config, dump_config, load_config
from sbp_fast.errors import UserError
from sbp_fast.evaluate.judge import check_judge
from sbp_fast.evaluate.multiple_choice import read_question_files
from sbp_fast.experiment.report.page import write_report
from sbp_fast.pipeline.distributed import launch
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.files import TEMPORARY_SUFFIX, atomic_open
from sbp_fast.pipeline.progress import Console, duration
from sbp_fast.pipeline.stage import out_of_space_is_a_user_error
from sbp_fast.stages.embed import embed
from sbp_fast.stages.evaluate import evaluate
from sbp_fast.stages.filter import filter_documents
from sbp_fast.stages.pair import pair
from sbp_fast.stages.prepare import prepare
from sbp_fast.stages.quality import measure_quality
from sbp_fast.stages.synthesize import synthesize
from sbp_fast.stages.train import Role
from sbp_fast.stages.train import train as train_alone

CONFIG = "config.toml"


def run(
    config: RunConfig, out: Path, *, console: Console, gpus: int = 1, force: bool = False, workers: Workers = LOCAL
) -> Path:
    """Run what is not yet done of every stage into `out` and write its report.

    Args:
        out: the run's directory; a killed run goes on in it.
        gpus: train and synthesize as this many processes on this machine.
        workers: what does the tasks of the data stages; if they are not local, they synthesize too.
        force: with a changed configuration, redo the stages that the change touches.

    Returns:
        The path of `report.html`; `results.json` lies beside it.

    Raises:
        UserError: `out` holds another run or something else, or a stage refuses its input.
        SystemExit: one of several processes of a stage failed, and has said why.
    """
    if config.evaluate.choices != "auto":  # read here too, so that a mistake shows before hours of training
        read_question_files(config.evaluate.choices)
    check_judge(config.quality)
    claim_directory(config, out, force)
    started = time.monotonic()
    stages = plan_stages(config, out, console, gpus, force, workers)
    for number, (name, work) in enumerate(stages, start=1):
        with console.stage(f"{number}/{len(stages) + 1} {name}"):
            work()
    with console.stage(f"{len(stages) + 1}/{len(stages) + 1} report"), out_of_space_is_a_user_error(out):
        report = write_report(out)
        console.say(f"all stages in {duration(time.monotonic() - started)}")
    return report


def plan_stages(
    config: RunConfig, out: Path, console: Console, gpus: int, force: bool, workers: Workers
) -> list[tuple[str, Callable[[], Any]]]:
    """Name and work of each stage; who reads whom is all here."""
    corpus, base, vectors, pairs = out / "corpus", out / "base", out / "vectors", out / "pairs"
    synthesizer, synthetic, kept = out / "synthesizer", out / "synthetic", out / "synthetic-kept"
    joint, oracle, evaluation = out / "joint", out / "oracle", out / "evaluation"
    arms = {"baseline": base, "sbp": joint, "oracle": oracle}
    how: dict[str, Any] = {"console": console, "force": force}
    by: dict[str, Any] = {**how, "workers": workers}

    def train(directory: Path, role: Role, **inputs: Any) -> None:
        if gpus == 1:
            train_alone(config, directory, role=role, corpus=corpus, **inputs, **how)
        else:
            flags = ["--oracle"] * (role == "oracle") + ["--force"] * force
            work_together(config, ["train", str(out / CONFIG), *flags], gpus, out=directory, corpus=corpus, **inputs)

    def draw() -> None:
        if gpus == 1 or not workers.local:
            synthesize(config, synthetic, corpus=corpus, model=synthesizer, **by)
        else:
            command = ["synthesize", str(out / CONFIG), *["--force"] * force]
            work_together(config, command, gpus, out=synthetic, corpus=corpus, model=synthesizer)

    return [
        ("prepare", lambda: prepare(config, corpus, **by)),
        ("base", lambda: train(base, "base")),
        ("embed", lambda: embed(config, corpus, vectors, **by)),
        ("pair", lambda: pair(config, corpus, vectors, pairs, **by)),
        ("synthesizer", lambda: train(synthesizer, "synthesizer", pairs=pairs, start=base)),
        ("synthesize", draw),
        ("filter", lambda: filter_documents(config, kept, corpus=corpus, synthetic=synthetic, **by)),
        (
            "quality",
            lambda: measure_quality(config, out / "quality", corpus=corpus, synthetic=synthetic, kept=kept, pairs=pairs, **how),
        ),
        ("joint", lambda: train(joint, "joint", synthetic=kept)),
        ("oracle", lambda: train(oracle, "oracle")),
        ("evaluate", lambda: evaluate(config, evaluation, corpus=corpus, models=arms, **how)),
    ]


def work_together(config: RunConfig, command: list[str], gpus: int, **paths: Path) -> None:
    """A stage as `gpus` processes; each is a program of its own."""
    arguments = [*command]
    for name, path in paths.items():
        arguments += [f"--{name}", str(path)]
    code = launch(arguments, gpus, resolve_device(config))
    if code:
        raise SystemExit(code)


def claim_directory(config: RunConfig, out: Path, force: bool) -> None:
    """Write the configuration into a new `out`, or make sure that an old one is this run's."""
    path = out / CONFIG
    with out_of_space_is_a_user_error(out):
        if not path.is_file():
            begun = out.is_dir() and [entry for entry in out.iterdir() if entry.name != CONFIG + TEMPORARY_SUFFIX]
            if begun or (out.exists() and not out.is_dir()):
                raise UserError(out, "holds files that are no run's", "choose another directory with --out")
            out.mkdir(parents=True, exist_ok=True)
        else:
            changes = diff_config(load_config([path]).model_dump(mode="json"), config.model_dump(mode="json"))
            if not changes:
                return
            if not force:
                remedy = "choose another directory with --out, or rerun with --force to redo the stages that this touches"
                raise UserError(out, f"holds another run: {'; '.join(changes)}", remedy)
        with atomic_open(path) as file:
            file.write(dump_config(config).encode())
