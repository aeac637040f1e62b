"""`python -m bench.aot`: compile every kernel ahead of time and fail where a figure is worse than in the committed table."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.aot import table
from bench.aot.binary import Figures
from bench.aot.compilation import TARGETS, Compilation
from bench.aot.compiler import listed, results
from bench.aot.table import Rows
from bench.aot.verdict import differences, failures

OLDEST = "3.6.0"  # the oldest release that the kernels support; `make aot` installs it into FOLDER
FOLDER = Path(sys.prefix) / f"triton-{OLDEST}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what is chosen, print figures and changes, and return 1 where something fails or got worse."""
    options = _parsed(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    compilations = listed(options.entries)
    chosen = {name: it for name, it in compilations.items() if not options.only or fnmatch(name, f"*{options.only}*")}
    if options.only and not chosen:
        sys.exit(f"error: no entry has {options.only!r} in its name.")
    known, before = table.read(options.table)
    reused = unchanged(chosen, known, before) if options.changed else {}
    chosen = {name: it for name, it in chosen.items() if not any(key[1] == name for key in reused)}
    rows = compiled(chosen, options, console) if chosen else {}
    failed, worse, other = judged(chosen, rows, before)

    _show(console, rows, {key for key, _ in failed + worse})
    _print(console, "change", other, "yellow")
    _print(console, "accepted" if options.update else "REGRESSION", worse, "yellow" if options.update else "red")
    _print(console, "FAILURE", failed, "red")
    wanted = {(name, target) for name, it in compilations.items() for target in it.targets}
    rows |= reused
    new, gone = rows.keys() - before.keys(), {key for key in before if key[1:] not in wanted}
    if new or gone:
        console.print(f"{len(new)} binaries are not in the table, {len(gone)} of the table are no more", style="yellow")
    if options.update and failed:
        console.print("the table was not written: something fails", style="red")
    elif options.update:
        table.write(options.table, {name: it.fingerprint() for name, it in compilations.items()}, rows)
    elif not failed and not worse and (other or new or gone):
        console.print("update the table with: python -m bench.aot --update")
    console.print(f"{len(rows)} binaries, {len(failed)} failures, {len(worse)} regressions, {len(other)} other changes")
    return 1 if failed or (worse and not options.update) else 0


def unchanged(chosen: Mapping[str, Compilation], known: Mapping[str, str], before: Rows) -> Rows:
    """Return the table's figures of entries whose sources have not changed and that it holds for every release and target."""
    whole = {
        name
        for name, it in chosen.items()
        if known.get(name) == it.fingerprint()
        and all((release, name, target) in before for release in releases() for target in it.targets)
    }
    return {key: figures for key, figures in before.items() if key[0] in releases() and key[1] in whole}


def compiled(chosen: Mapping[str, Compilation], options: argparse.Namespace, console: Console) -> Rows:
    """Compile the chosen entries for the chosen targets and releases, and return their figures."""
    folders = {release: folder for release, folder in releases().items() if options.release in (None, release)}
    if not folders or not all(folder is None or folder.is_dir() for folder in folders.values()):
        sys.exit(f"error: triton {options.release or OLDEST} is not installed. `make aot` installs {OLDEST} into {FOLDER}.")
    tasks = [(name, target) for name, it in chosen.items() for target in it.targets if options.target in (None, target)]
    fingerprints = {name: it.fingerprint() for name, it in chosen.items()}
    rows: Rows = {}
    for release, folder in folders.items():
        done = results(tasks, fingerprints, folder=folder, entries=options.entries, processes=options.processes)
        for name, target, figures in track(done, f"triton {release}", total=len(tasks), console=console):
            rows[release, name, target] = figures
    return rows


def releases() -> dict[str, Path | None]:
    """Return the releases of triton to compile with, each with the folder that holds it, None for the installed one."""
    installed = version("triton")
    return {installed: None} if installed == OLDEST else {installed: None, OLDEST: FOLDER}


Lines = list[tuple[tuple[str, str, str], str]]  # (release, entry, target), message


def judged(chosen: Mapping[str, Compilation], rows: Rows, before: Rows) -> tuple[Lines, Lines, Lines]:
    """Return failures, regressions and other changes of the rows."""
    failed: Lines = []
    worse: Lines = []
    other: Lines = []
    for key, figures in rows.items():
        release, name, target = key
        failed += [(key, line) for line in failures(chosen[name], release, target, figures)]
        impossible = chosen[name].requires.why_impossible(release, target)
        if impossible and figures.get("blocks"):
            other.append((key, f"compiles and fits, though declared impossible ({impossible})"))
        regressions, changes = differences(before.get(key, figures), figures)
        worse += [(key, line) for line in regressions]
        other += [(key, line) for line in changes]
    return failed, worse, other


def _print(console: Console, heading: str, lines: Lines, style: str) -> None:
    for (release, name, target), line in lines:
        console.print(f"{heading}: {name}, {target}, triton {release}: {line}", style=style, soft_wrap=True, highlight=False)


def _show(console: Console, rows: Rows, bad: set[tuple[str, str, str]]) -> None:
    shown = Table(title="compiled ahead of time; nothing was run")
    figures = ("registers", "spills", "local", "shared", "blocks", "warps", "in flight")
    for column in ("entry", "target", "triton", *figures, "instructions"):
        shown.add_column(column, justify="left" if column in ("entry", "target", "triton", "instructions") else "right")
    last = ""
    for key in sorted(rows, key=lambda key: (key[1], list(TARGETS).index(key[2]), key[0])):
        release, name, target = key
        if name != last:
            shown.add_section()
        shown.add_row(name if name != last else "", target, release, *_cells(rows[key]), style="red" if key in bad else None)
        last = name
    console.print(shown)


def _cells(figures: Figures) -> Iterator[str]:
    if "error" in figures:
        yield from ("", "", "", "", "", "", "", figures["error"])
        return
    for name in ("registers", "spill_bytes", "local_bytes", "shared_bytes", "blocks", "warps"):
        yield f"{figures[name]:,}"
    yield str(figures.get("products_in_flight", ""))
    yield " ".join(f"{kind}:{count}" for kind, count in figures["instructions"].items())


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", help="entries with this in their names; * and ? are wildcards")
    parser.add_argument("--target", choices=TARGETS, help="one target")
    parser.add_argument("--release", help="one release of triton")
    parser.add_argument(
        "--changed", action="store_true", help="only entries that the table does not hold or that changed since"
    )
    parser.add_argument("--update", action="store_true", help="write the table, regressions too, if nothing fails")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="number of processes that compile")
    parser.add_argument("--table", type=Path, default=table.PATH, help="to compare with")
    parser.add_argument("--entries", default="bench.compilations", help="module whose compilations() lists what to compile")
    options = parser.parse_args(arguments)
    if options.update and (options.only or options.target or options.release):
        parser.error("--update writes the whole table: leave out --only, --target and --release.")
    return options


if __name__ == "__main__":
    sys.exit(main())
