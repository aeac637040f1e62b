"""`python -m bench.aot`: compile every kernel ahead of time, compare with the committed table, fail where one got worse."""

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

OLDEST = "3.6.0"  # the release beside which the kernels must work too; `make aot` puts it into FOLDER
FOLDER = Path(sys.prefix) / f"triton-{OLDEST}"


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parsed(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    compilations = listed(asked.entries)
    chosen = {name: it for name, it in compilations.items() if not asked.only or fnmatch(name, f"*{asked.only}*")}
    if asked.only and not chosen:
        sys.exit(f"error: no entry has {asked.only!r} in its name.")
    known, before = table.read(asked.table)
    kept = unchanged(chosen, known, before) if asked.changed else {}
    chosen = {name: it for name, it in chosen.items() if not any(key[1] == name for key in kept)}
    rows = compiled(chosen, asked, console) if chosen else {}
    failed, worse, other = judged(chosen, rows, before)

    _show(console, rows, {key for key, _ in failed + worse})
    _print(console, "change", other, "yellow")
    _print(console, "accepted" if asked.update else "REGRESSION", worse, "yellow" if asked.update else "red")
    _print(console, "FAILURE", failed, "red")
    wanted = {(name, target) for name, it in compilations.items() for target in it.targets}
    rows |= kept
    new, gone = rows.keys() - before.keys(), {key for key in before if key[1:] not in wanted}
    if new or gone:
        console.print(f"{len(new)} binaries are not in the table, {len(gone)} of the table are no more", style="yellow")
    if asked.update and failed:
        console.print("the table was not written: something fails", style="red")
    elif asked.update:
        table.write(asked.table, {name: it.fingerprint() for name, it in compilations.items()}, rows)
    elif not failed and not worse and (other or new or gone):
        console.print("write them down with: python -m bench.aot --update")
    console.print(f"{len(rows)} binaries, {len(failed)} failures, {len(worse)} regressions, {len(other)} other changes")
    return 1 if failed or (worse and not asked.update) else 0


def unchanged(chosen: Mapping[str, Compilation], known: Mapping[str, str], before: Rows) -> Rows:
    """The table's figures of the entries that stand in it whole and as they are."""
    whole = {
        name
        for name, it in chosen.items()
        if known.get(name) == it.fingerprint()
        and all((release, name, target) in before for release in releases() for target in it.targets)
    }
    return {key: figures for key, figures in before.items() if key[0] in releases() and key[1] in whole}


def compiled(chosen: Mapping[str, Compilation], asked: argparse.Namespace, console: Console) -> Rows:
    """Figures of the chosen entries for the targets and releases asked for."""
    folders = {release: folder for release, folder in releases().items() if asked.release in (None, release)}
    if not folders or not all(folder is None or folder.is_dir() for folder in folders.values()):
        sys.exit(f"error: triton {asked.release or OLDEST} is not here. `make aot` puts {OLDEST} into {FOLDER}.")
    tasks = [(name, target) for name, it in chosen.items() for target in it.targets if asked.target in (None, target)]
    fingerprints = {name: it.fingerprint() for name, it in chosen.items()}
    rows: Rows = {}
    for release, folder in folders.items():
        done = results(tasks, fingerprints, folder=folder, entries=asked.entries, processes=asked.processes)
        for name, target, figures in track(done, f"triton {release}", total=len(tasks), console=console):
            rows[release, name, target] = figures
    return rows


def releases() -> dict[str, Path | None]:
    """Release of triton -> the folder that holds it, None for the installed one."""
    installed = version("triton")
    return {installed: None} if installed == OLDEST else {installed: None, OLDEST: FOLDER}


Lines = list[tuple[tuple[str, str, str], str]]  # (release, entry, target), what is said of it


def judged(chosen: Mapping[str, Compilation], rows: Rows, before: Rows) -> tuple[Lines, Lines, Lines]:
    """Failures, regressions and other changes of the rows."""
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


def _print(console: Console, what: str, lines: Lines, style: str) -> None:
    for (release, name, target), line in lines:
        console.print(f"{what}: {name}, {target}, triton {release}: {line}", style=style, soft_wrap=True, highlight=False)


def _show(console: Console, rows: Rows, bad: set[tuple[str, str, str]]) -> None:
    shown = Table(title="compiled ahead of time; nothing was run")
    for column in ("entry", "target", "triton", "registers", "spills", "local", "shared", "blocks", "warps", "instructions"):
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
        yield from ("", "", "", "", "", "", figures["error"])
        return
    for name in ("registers", "spill_bytes", "local_bytes", "shared_bytes", "blocks", "warps"):
        yield f"{figures[name]:,}"
    yield " ".join(f"{kind}:{count}" for kind, count in figures["instructions"].items())


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", help="entries with this in their names; * and ? are wild")
    parser.add_argument("--target", choices=TARGETS, help="one target")
    parser.add_argument("--release", help="one release of triton")
    parser.add_argument("--changed", action="store_true", help="entries that the table does not hold as they are")
    parser.add_argument("--update", action="store_true", help="write the table, regressions too, if nothing fails")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="to compile in at once")
    parser.add_argument("--table", type=Path, default=table.PATH, help="to compare with")
    parser.add_argument("--entries", default="bench.compilations", help="module whose compilations() lists what to compile")
    asked = parser.parse_args(arguments)
    if asked.update and (asked.only or asked.target or asked.release):
        parser.error("--update writes the whole table: leave out --only, --target and --release.")
    return asked


if __name__ == "__main__":
    sys.exit(main())
