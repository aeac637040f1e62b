"""The command line: each command loads its configuration and calls one function; a mistake is one line, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from sbp_fast import __version__, cli_documents, cli_models
from sbp_fast.cli_options import (
    Address,
    Corpus,
    DryRun,
    EngineName,
    Force,
    Gpus,
    Out,
    Settings,
    Verbose,
    load_settings,
    print_parts,
    stage_console,
)
from sbp_fast.errors import UserError
from sbp_fast.pipeline.executors.choose import open_workers
from sbp_fast.pipeline.interrupts import (
    STOPPED,
    Interrupted,
    Stopped,
    abandon,
    signal_received,
    wait_for_announcement,
    watch_signals,
)
from sbp_fast.pipeline.progress import Console, print_error, print_line

app = typer.Typer(
    help="Synthetic bootstrapped pretraining: learn how documents relate, write more of them, pretrain on both.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_documents.app)
app.add_typer(cli_models.app)

EXPERIMENTS, INSPECTION, CONVERSION = "Experiments", "Inspection", "Import and export"
"""Headings of `sbp-fast --help`; the commands of single stages have their own."""


def main() -> None:
    """Run the command line."""
    # Waiting threads spin, which beside another busy process costs far more than it saves (docs/log.md). The variable is read
    # when torch is first imported, which is one reason why commands import what they need themselves.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    run_command(app)


def run_command(command: Callable[[], object]) -> None:
    """Run a command; a user's mistake is one line and exit code 2, and SIGINT or SIGTERM ends it (see `interrupts`)."""
    rank0 = os.environ.get("RANK", "0") == "0"  # of several processes that raise the same error, one prints it
    with watch_signals(quiet=not rank0):
        try:
            command()
        except UserError as error:
            if number := signal_received():  # a signal to all processes ended a worker first
                abandon(number, STOPPED)
            if rank0:
                print_error(error)
            sys.exit(2)
        except Stopped as stopped:
            wait_for_announcement()
            if rank0:
                print_line(str(stopped))
            sys.exit(stopped.exit_code)
        except Interrupted as interrupted:
            sys.stdout.flush()
            abandon(interrupted.signal_number, STOPPED if rank0 else "")


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Print the version."""
    if show:
        print(f"sbp-fast {__version__}")
        raise typer.Exit


@app.command(epilog="Example: sbp-fast run small corpus.path='mine/*.jsonl.zst' --out runs/mine", rich_help_panel=EXPERIMENTS)
def run(
    settings: Settings,
    out: Annotated[Path | None, typer.Option(help="The run's directory (default: runs/NAME).")] = None,
    gpus: Gpus = 1,
    engine: EngineName = "local",
    address: Address = None,
    force: Annotated[bool, typer.Option("--force", help="Rerun the stages that a changed setting or input affects.")] = False,
    until: Annotated[str, typer.Option(help="Run this stage and those that it needs, such as embed, and no more.")] = "",
    side_by_side: Annotated[
        int, typer.Option(min=1, help="Run so many stages at a time on the CPU, each with its share of the threads.")
    ] = 1,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole experiment, from documents to report; a stopped run resumes."""
    config = load_settings(settings)
    with stage_console("starting", verbose) as console:
        from sbp_fast.experiment.dry_run import describe, dry_run_entries
        from sbp_fast.experiment.report.summary import summary_table
        from sbp_fast.experiment.results import collect
        from sbp_fast.experiment.run import run as run_experiment

    directory = out or Path("runs") / config.name
    if dry_run:
        print_parts(describe(dry_run_entries(config, directory, gpus=gpus, force=force, until=until), directory))
        return
    with open_workers(engine, address) as workers:
        report = run_experiment(
            config,
            directory,
            console=console,
            gpus=gpus,
            force=force,
            workers=workers,
            until=until,
            side_by_side=side_by_side,
        )
    if report is None:
        return
    console.print_table(summary_table(collect(directory)))
    console.say(f"report: {report}")


@app.command(epilog="Example: sbp-fast lab --seeds 0 --seeds 1 --out runs/lab", rich_help_panel=EXPERIMENTS)
def lab(
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of the configuration `lab`: key.path=value.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of all worlds and seeds.")] = Path("runs/lab"),
    seeds: Annotated[list[int] | None, typer.Option(min=0, help="Seeds, each a world of its own (default: 0, 1, 2).")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="A setting of the world of two names and its values: linked=0.3,0.9.")
    ] = None,
) -> None:
    """Run worlds whose truth is known, one in which relation must pay and one in which it must not; a stopped run resumes."""
    from sbp_fast.lab.run import run_lab
    from sbp_fast.lab.sweeps import Sweep

    report = run_lab(out, seeds or (0, 1, 2), overrides or (), sweeps=[Sweep.parse(text) for text in sweep or ()])
    print_line(f"report: {report}")


@app.command(epilog="Example: sbp-fast report runs/demo", rich_help_panel=EXPERIMENTS)
def report(directory: Annotated[Path, typer.Argument(help="Directory of a finished run.")]) -> None:
    """Rewrite report.html and results.json of a finished run."""
    from sbp_fast.experiment.report.page import write_report

    print_line(str(write_report(directory)))


@app.command(
    epilog="Example: sbp-fast sample runs/demo/tune/related --corpus runs/demo/prepare --seed-text 'Chad: Economy'",
    rich_help_panel=INSPECTION,
)
def sample(
    model: Annotated[Path, typer.Argument(help="A trained model's directory.")],
    *,
    corpus: Corpus,
    seed_text: Annotated[str, typer.Option(help="Write related documents after this text; without it, any documents.")] = "",
    count: Annotated[int, typer.Option(min=1, max=1024, help="Number of documents.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random numbers.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(help="As synthesize.temperature; 0 takes the most probable token.")
    ] = None,
) -> None:
    """Print documents that a model writes after a text, as a synthesizer does, or after none."""
    from sbp_fast.config.files import load_config
    from sbp_fast.stages.sample import sample as write

    changes = [f"seed={seed}"] + ([] if temperature is None else [f"synthesize.temperature={temperature}"])
    write(load_config([], changes), model, corpus=corpus, seed_text=seed_text, count=count, console=Console())


@app.command(epilog="Example: sbp-fast show runs/demo/filter/related --corpus runs/demo/prepare", rich_help_panel=INSPECTION)
def show(
    directory: Annotated[Path, typer.Argument(help="Output of prepare, pair, synthesize or filter.")],
    *,
    corpus: Annotated[Path | None, typer.Option(help="Output of `prepare` that it was made from.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Documents or pairs to print.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Decides which.")] = 0,
) -> None:
    """Print the counts of a stage's output, why documents were rejected, and a few examples."""
    from sbp_fast.stages.show import show as print_output

    print_output(directory, corpus=corpus, examples=examples, seed=seed, console=Console())


@app.command(epilog="Example: sbp-fast watch runs/demo", rich_help_panel=INSPECTION)
def watch(
    run: Annotated[Path, typer.Argument(help="Directory of a run, begun or finished.")],
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine (0: a free one).")] = 8300,
    once: Annotated[bool, typer.Option("--once", help="Print the stages in the terminal once, and serve no page.")] = False,
) -> None:
    """Serve a page that shows a run while it goes on: stages, time left, losses and samples; Ctrl-C ends it."""
    if once:
        from sbp_fast.experiment.watch.table import describe_run

        print_parts(describe_run(run))
        return
    with stage_console("starting", False):
        from sbp_fast.experiment.watch.server import watch as serve

    serve(run, port)


@app.command(epilog="Example: sbp-fast config demo --diff", rich_help_panel=INSPECTION)
def config(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG...] [KEY.PATH=VALUE]...", help="As for `run`.")
    ] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Only what differs from the defaults.")] = False,
) -> None:
    """Print a configuration as TOML with the meaning of each key; without arguments, the defaults."""
    from sbp_fast.config import RunConfig
    from sbp_fast.config.describe import describe_config

    print(describe_config(load_settings(settings) if settings else RunConfig(), changes=diff), end="")


@app.command(epilog="Example: sbp-fast plan 3b-200b --gpus 64 --gpu h200", rich_help_panel=EXPERIMENTS)
def plan(
    settings: Settings,
    gpus: Annotated[int, typer.Option(min=0, help="Number of GPUs (0: as many as share the weights, or one).")] = 0,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: a100 (80 GB), h100, h200 or b200.")] = "h100",
) -> None:
    """Estimate memory, FLOPs, GPU hours and disk of every stage, and whether training fits, by arithmetic alone."""
    config = load_settings(settings)
    from sbp_fast.experiment.plan.tables import plan_tables

    print_parts(plan_tables(config, gpus or config.parallel.shard_processes or 1, gpu))


@app.command(epilog="Example: sbp-fast doctor demo", rich_help_panel=INSPECTION)
def doctor(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG...] [KEY.PATH=VALUE]...", help="As for `run`: does the experiment fit here?"),
    ] = None,
) -> None:
    """Show what this machine can do, what is missing, and whether an experiment fits."""
    config = load_settings(settings) if settings else None
    from sbp_fast.doctor import diagnose

    Console().print_table(diagnose(config))


@app.command(
    epilog="Example: sbp-fast export runs/demo/train/sbp --corpus runs/demo/prepare --out demo-sbp", rich_help_panel=CONVERSION
)
def export(
    model: Annotated[Path, typer.Argument(help="A trained model's directory.")],
    *,
    corpus: Corpus,
    out: Out,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    push_to: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="Upload it to this repository of the Hugging Face Hub too.")
    ] = "",
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody read a repository that --push-to makes; else it is private.")
    ] = False,
    force: Force = False,
) -> None:
    """Write a model as a Hugging Face directory that transformers and vLLM load, with a model card."""
    from sbp_fast.data.tokenizer import TOKENIZER
    from sbp_fast.experiment.model_card import model_card
    from sbp_fast.model.hub import check_repository, push_to_hub
    from sbp_fast.stages.huggingface import export_hugging_face

    if push_to:
        check_repository(push_to)
    card = model_card(model, corpus)
    manifest = export_hugging_face(model, corpus / TOKENIZER, out, dtype=dtype, card=card, force=force)
    print_line(str(out))
    if push_to:
        print_line(push_to_hub(out, manifest.files, push_to, public=public))


@app.command(
    name="export-tokens",
    epilog="Example: sbp-fast export-tokens mine/prepare/train --to megatron --out mine/out",
    rich_help_panel=CONVERSION,
)
def export_tokens(
    corpus: Annotated[str, typer.Argument(help="A token corpus: a directory or URL such as mine/prepare/train.")],
    *,
    to: Annotated[str, typer.Option(help="megatron, mds or parquet.")],
    out: Out,
    force: Force = False,
) -> None:
    """Write token shards in the format of Megatron-LM, MosaicML streaming, or as parquet."""
    from sbp_fast.stages.export_tokens import export_tokens as work

    work(corpus, to, out, console=Console(), force=force)


@app.command(name="import", epilog="Example: sbp-fast import Qwen3-0.6B --out mine/base", rich_help_panel=CONVERSION)
def import_command(
    directory: Annotated[Path, typer.Argument(help="A Hugging Face directory on this machine.")],
    *,
    out: Out,
    context: Annotated[
        int, typer.Option(min=0, help="Longest document in tokens (0: half of the model's positions, which is often a lot).")
    ] = 0,
    force: Force = False,
) -> None:
    """Turn a Hugging Face Qwen3 or Llama directory into a model to start from, with its tokenizer."""
    from sbp_fast.stages.huggingface import import_hugging_face

    import_hugging_face(directory, out, context=context, console=Console(), force=force)
    print_line(str(out))
