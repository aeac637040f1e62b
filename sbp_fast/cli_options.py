"""What the commands share: the arguments and options of several of them, and the loading of the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config, refuse_repeated_keys
from sbp_fast.errors import UserError
from sbp_fast.pipeline.progress import Console

if TYPE_CHECKING:
    from sbp_fast.experiment.sources import Source

Settings = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG... [KEY.PATH=VALUE]...",
        help="TOML files, or shipped names such as small, composed left to right; then single settings.",
    ),
]
Out = Annotated[Path, typer.Option(help="Directory to write; it must not hold anything else.")]
Corpus = Annotated[Path, typer.Option(help="Output of `prepare`.")]
Profile = Annotated[str | None, typer.Option(help="Record steps FIRST:LAST into OUT.profile, such as 10:13.")]
SourceName = Annotated[str, typer.Option(help="Source of synthetic documents whose settings apply, a table \\[sources.NAME].")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output made from other settings or inputs.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done, from what, and the expected time and disk; write nothing.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Print technical details too, such as precisions, padding and the settings of caches.")
]
Gpus = Annotated[int, typer.Option(min=1, help="Processes on this machine, each with one GPU; without GPUs, on the CPU.")]
EngineName = Annotated[str, typer.Option("--engine", help="Where tasks run: local (this machine) or ray (a cluster).")]
Address = Annotated[
    str | None, typer.Option(help="With --engine ray: auto (the default), HOST:PORT or ray://HOST:PORT of the cluster.")
]


def print_parts(parts: Iterable[Table | str]) -> None:
    """Print tables, and lines between them."""
    console = Console()
    for part in parts:
        if isinstance(part, str):
            console.say(part)
        else:
            console.rich.print(part, soft_wrap=False)  # as wide as COLUMNS, on a terminal or not


@contextmanager
def stage_console(stage: str, verbose: bool) -> Iterator[Console]:
    """Yield the console of a command that runs a stage; its bar moves from here on, while the command imports what it needs."""
    console = Console(verbose=verbose)
    with console.bar(stage):
        yield console


def load_source(settings: list[str], name: str) -> tuple[RunConfig, Source]:
    """Return the configuration for the stages of a source, and the source.

    Raises:
        UserError: as `load_settings`; the configuration has no such source.
    """
    from sbp_fast.experiment.sources import sources_of, stage_config

    config = load_settings(settings)
    sources = sources_of(config)
    if name not in sources:
        raise UserError(f"--source {name}", "is unknown", f"known: {', '.join(sources)}; or add a table [sources.{name}]")
    return stage_config(config, sources[name]), sources[name]


def load_settings(settings: list[str]) -> RunConfig:
    """Return the configuration that the arguments of a command compose.

    Raises:
        UserError: no file is among them, or a file or a setting is wrong.
    """
    files = [setting for setting in settings if "=" not in setting]
    if not files:
        raise UserError(
            "command line", "names no configuration", "put a TOML file or a shipped name such as small before the settings"
        )
    overrides = [setting for setting in settings if "=" in setting]
    refuse_repeated_keys(overrides)
    return load_config(files, overrides)
