"""The commands that run one stage on models each: training, tuning, choosing, scoring and comparing them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbp_fast.cli_options import (
    Corpus,
    DryRun,
    Force,
    Gpus,
    Out,
    Profile,
    Settings,
    SourceName,
    Verbose,
    load_settings,
    load_source,
    print_parts,
    stage_console,
)
from sbp_fast.config import RunConfig
from sbp_fast.errors import UserError

if TYPE_CHECKING:
    from sbp_fast.train.task import TrainTask

app = typer.Typer()


@app.command(epilog="Example: sbp-fast train small pretrain.tokens=99000 --arm baseline --corpus mine/prepare --out mine/train")
def train(
    settings: Settings,
    *,
    corpus: Corpus,
    out: Out,
    arm: Annotated[str, typer.Option(help="Arm to train, a table \\[arms.NAME]: baseline, sbp, oracle or one of yours.")] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="Training seed (default: the arm's first).")] = None,
    synthetic: Annotated[
        Path | None, typer.Option(help="Output of `filter` or `stitch`, for an arm that reads synthetic documents.")
    ] = None,
    stitched: Annotated[
        Path | None, typer.Option(help="Output of `stitch --pairs`, for an arm that reads related documents joined.")
    ] = None,
    gpus: Gpus = 1,
    profile: Profile = None,
    force: Force = False,
    verbose: Verbose = False,
    dry_run: DryRun = False,
) -> None:
    """Train an arm from scratch, by default the baseline.

    Under torchrun, on any number of machines, all processes train together.
    """
    config = load_settings(settings)
    from sbp_fast.train.task import TrainTask

    task = TrainTask.of_arm(config, arm or config.baseline, seed)
    inputs = {"corpus": corpus, "synthetic": synthetic, "stitched": stitched}
    if dry_run:
        from sbp_fast.experiment.dry_run import describe, training_entry

        print_parts(describe([training_entry(config, task, out, inputs, gpus=gpus, force=force)], out))
        return
    _train(config, task, out, inputs, gpus=gpus, verbose=verbose, force=force, profile_steps=profile)


@app.command(epilog="Example: sbp-fast tune small --corpus mine/prepare --pairs mine/pair --start mine/train --out mine/tune")
def tune(
    settings: Settings,
    *,
    corpus: Corpus,
    pairs: Annotated[Path, typer.Option(help="Output of `pair`.")],
    start: Annotated[
        Path | None, typer.Option(help="Model to start from, unless from scratch: output of `train` or `import`.")
    ] = None,
    source: SourceName = "related",
    out: Out,
    gpus: Gpus = 1,
    profile: Profile = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Tune a synthesizer to write a document's partner after the document.

    Under torchrun, on any number of machines, all processes train together.
    """
    config, tuned = load_source(settings, source)
    from sbp_fast.train.task import TrainTask

    task = TrainTask.of_synthesizer(config, from_scratch=tuned.from_scratch)
    inputs = {"corpus": corpus, "pairs": pairs, "start": start}
    _train(config, task, out, inputs, gpus=gpus, verbose=verbose, force=force, profile_steps=profile)


def _train(
    config: RunConfig, task: TrainTask, out: Path, inputs: dict[str, Path | None], *, gpus: int, verbose: bool, **options: Any
) -> None:
    with stage_console(f"train {task.name}", verbose) as console:
        from sbp_fast.pipeline.launcher import run_in_processes
        from sbp_fast.stages.train import train as work

        run_in_processes(work, config, task, out, gpus=gpus, console=console, **inputs, **options)


@app.command(epilog="Example: sbp-fast choose mine.toml --arm baseline-tuned --models mine/a --models mine/b --out mine/choose")
def choose(
    settings: Settings,
    *,
    arm: Annotated[str, typer.Option(help="Arm with several recipes, a table \\[arms.NAME].")],
    models: Annotated[list[Path], typer.Option(help="Output of `train`, one for each recipe in their order.")],
    out: Out,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Choose the recipe whose model has the lowest loss on validation documents."""
    config = load_settings(settings)
    if arm not in config.arms:
        raise UserError(f"--arm {arm}", "is unknown", f"known: {', '.join(config.arms)}")
    with stage_console("choose", verbose) as console:
        from sbp_fast.stages.choose import choose as work

        work(config, out, arm=arm, models={str(model): model for model in models}, console=console, force=force)


@app.command(
    epilog="Example: sbp-fast relation small --corpus mine/prepare --pairs mine/pair --model mine/synthesizer --out mine/rel"
)
def relation(
    settings: Settings,
    *,
    corpus: Corpus,
    pairs: Annotated[Path, typer.Option(help="Output of `pair`, whose pairs of held-out documents are read.")],
    model: Annotated[Path, typer.Option(help="A synthesizer: output of `tune`.")],
    source: SourceName = "related",
    out: Out,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Measure whether a synthesizer learnt a relation: nats of held-out partners given their own seed, another, none."""
    config, _ = load_source(settings, source)
    with stage_console("relation", verbose) as console:
        from sbp_fast.stages.relation import measure_relation

        measure_relation(config, out, corpus=corpus, pairs=pairs, model=model, console=console, force=force)


@app.command(epilog="Example: sbp-fast evaluate small --corpus mine/prepare --model mine/train --out mine/evaluate")
def evaluate(
    settings: Settings,
    *,
    corpus: Corpus,
    model: Annotated[Path, typer.Option(help="A trained model: output of `train`.")],
    harness: Annotated[
        str, typer.Option(metavar="TASKS", help="Instead, run these tasks of lm-evaluation-harness, separated by commas.")
    ] = "",
    out: Out,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Score a model on held-out text and questions, or by lm-evaluation-harness."""
    config = load_settings(settings)
    with stage_console("evaluate", verbose) as console:
        from sbp_fast.stages.evaluate import evaluate as work
        from sbp_fast.stages.harness import evaluate_by_harness

        if harness:
            tasks = [name.strip() for name in harness.split(",")]
            evaluate_by_harness(config, out, corpus=corpus, model=model, tasks=tasks, console=console, force=force)
        else:
            work(config, out, corpus=corpus, model=model, console=console, force=force)


@app.command(epilog="Example: sbp-fast compare small --scores baseline=mine/a --scores sbp=mine/b --out mine/compare")
def compare(
    settings: Settings,
    *,
    scores: Annotated[
        list[str],
        typer.Option(help="ARM=DIRECTORY, output of `evaluate`; the baseline first, several for an arm with seeds."),
    ],
    out: Out,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Compare arms by their scores, with intervals."""
    config = load_settings(settings)
    directories: dict[str, list[Path]] = {}
    for entry in scores:
        name, equals, directory = entry.partition("=")
        if not equals:
            raise UserError(f"--scores {entry}", "has no name", "write it as ARM=DIRECTORY, such as baseline=mine/evaluate")
        directories.setdefault(name, []).append(Path(directory))
    with stage_console("compare", verbose) as console:
        from sbp_fast.stages.compare import compare as work

        work(config, out, scores=directories, console=console, force=force)


for _command in app.registered_commands:
    _command.rich_help_panel = "Single stages on models"  # their heading in `sbp-fast --help`
