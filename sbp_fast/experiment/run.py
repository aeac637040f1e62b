"""The runner of an experiment: runs every stage after its inputs, each once, and resumes after a kill."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sbp_fast.config import RunConfig
from sbp_fast.config.files import diff_config, dump_config, load_config
from sbp_fast.errors import UserError
from sbp_fast.evaluate.judge import check_judge
from sbp_fast.evaluate.multiple_choice import read_question_files
from sbp_fast.experiment.arms import arms_of
from sbp_fast.experiment.graph import Stage, needed_stages, stages_of
from sbp_fast.experiment.report.page import write_report
from sbp_fast.experiment.run_progress import RunProgress
from sbp_fast.experiment.side_by_side import run_side_by_side, run_stage, stage_title
from sbp_fast.experiment.sources import used_sources
from sbp_fast.generate.synthesis import check_names
from sbp_fast.neighbors.backends import check_backend
from sbp_fast.neighbors.endpoint_encoder import check_endpoint
from sbp_fast.pipeline.credentials import strip_credentials
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.files import TEMPORARY_SUFFIX, atomic_open
from sbp_fast.pipeline.output import disk_errors_are_user_errors, resolve_output
from sbp_fast.pipeline.progress import Console, duration
from sbp_fast.stages.huggingface import check_start
from sbp_fast.train.task import check_recipe
from sbp_fast.train.trackers import TRACKERS

CONFIG = "config.toml"


def run(
    config: RunConfig,
    out: Path,
    *,
    console: Console,
    gpus: int = 1,
    force: bool = False,
    workers: Workers = LOCAL,
    until: str = "",
    side_by_side: int = 1,
) -> Path | None:
    """Run every unfinished stage of an experiment in `out` and write its report.

    Args:
        config: of the run.
        out: the run's directory; a killed run resumes in it.
        console: for progress.
        gpus: train and synthesize with this many processes on this machine.
        force: with a changed configuration, rerun the stages that the change affects.
        workers: runs the tasks of the data stages; if they are not local, they synthesize too.
        until: run this stage and those that it needs, and no report ("": all).
        side_by_side: run so many stages at a time, each with its share of the threads.

    Returns:
        The path of `report.html`, beside which `results.json` lies; None with `until`.

    Raises:
        UserError: `out` holds another run or something else, `until` is no stage of it, options exclude each other, or a stage
            refuses its input.
        SystemExit: one of several processes of a stage failed, and has printed the reason.
    """
    if side_by_side > 1 and (gpus > 1 or not workers.local):
        raise UserError("options", "exclude each other", "give --side-by-side, or --gpus, or --engine ray")
    stages, chosen = check_run(config, until)
    claim_directory(config, out, force)
    started = time.monotonic()
    progress = RunProgress(config, out, stages, chosen, console, gpus=gpus, side_by_side=side_by_side)
    progress.print_banner()
    if side_by_side > 1:
        options: dict[str, Any] = {"force": force, "console": console, "ended": progress.ended}
        run_side_by_side(config, out, chosen, processes=side_by_side, **options)
    else:
        for name in stages:
            if name in chosen:
                run_stage(stages, name, out, console, gpus=gpus, force=force, workers=workers)
                progress.ended(name)
    if until:
        return None
    with console.stage(stage_title(stages, "report")), disk_errors_are_user_errors(out):
        report = write_report(out)
        console.say(f"all stages in {duration(time.monotonic() - started)}")
    return report


def check_run(config: RunConfig, until: str = "") -> tuple[dict[str, Stage], set[str]]:
    """Refuse what would only show after hours of work; return all stages of a run, and the names of those to run.

    Args:
        config: of the run.
        until: the stage that is wanted with those that it needs; "" for all.

    Raises:
        UserError: a question file, the judge or a name in the configuration is wrong, or `until` is no stage.
    """
    if config.evaluate.choices != "auto":
        read_question_files(config.evaluate.choices)
    check_judge(config.quality)
    check_endpoint(config.embed)
    check_registered_names(config)
    stages = stages_of(config)
    if until and until not in stages:
        raise UserError(f"--until {until}", "no stage of this run", f"its stages: {', '.join(stages)}")
    return stages, needed_stages(stages, until) if until else set(stages)


def check_registered_names(config: RunConfig) -> None:
    """Raise a UserError for a name in the configuration that nothing is registered under, before any work is done."""
    for arm in arms_of(config).values():
        for recipe in arm.settings.resolve_recipes(config.pretrain):
            check_recipe(recipe)
    for source in used_sources(config).values():
        check_recipe(source.config.synthesizer)
        check_backend(source.config.pair)
        check_names(source.config)
        if source.imports:
            check_start(Path(source.settings.model), config)
    for tracker in config.log.trackers:
        TRACKERS[tracker]


def claim_directory(config: RunConfig, out: Path, force: bool) -> None:
    """Write the configuration, without secrets in URLs, into a new `out`, or check that an existing one belongs to this run.

    Raises:
        UserError: see `check_directory`.
    """
    with disk_errors_are_user_errors(out):
        if not check_directory(config, out, force):
            out = resolve_output(out)
            out.mkdir(parents=True, exist_ok=True)
            with atomic_open(out / CONFIG) as file:
                file.write(dump_config(_without_secrets(config)).encode())


def check_directory(config: RunConfig, out: Path, force: bool) -> bool:
    """Return whether `out` holds a run with this configuration already; without writing anything.

    Raises:
        UserError: `out` holds files of something else, or a run with another configuration (unless `force`).
    """
    out = resolve_output(out)
    path = out / CONFIG
    if not path.is_file():
        begun = out.is_dir() and [entry for entry in out.iterdir() if entry.name != CONFIG + TEMPORARY_SUFFIX]
        if begun or (out.exists() and not out.is_dir()):
            raise UserError(out, "holds files that are no run's", "choose another directory with --out")
        return False
    changes = diff_config(load_config([path]).model_dump(mode="json"), _without_secrets(config).model_dump(mode="json"))
    if changes and not force:
        remedy = "choose another directory with --out, or rerun with --force to redo the stages that this touches"
        raise UserError(out, f"holds another run: {'; '.join(changes)}", remedy)
    return not changes


def _without_secrets(config: RunConfig) -> RunConfig:
    return RunConfig.model_validate(strip_credentials(config.model_dump(mode="json")))
