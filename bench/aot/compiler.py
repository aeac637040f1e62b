"""Compiles apart from the caller, with one release of triton.

`python -m bench.aot.compiler ENTRIES PROCESSES`, in an environment that makes `import triton` find the release wanted,
reads what to compile as JSON from standard input, {"tasks": [[name, target]...], "fingerprints": {name: fingerprint}}, and
prints a JSON line [name, target, figures] for each task.
Every compilation is a process of its own, so that a compiler that aborts takes nothing else with it.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from bench.aot.compilation import TARGETS, Compilation

ROOT = Path(__file__).parents[2]
Task = tuple[str, str]  # name of the compilation, target


def results(
    tasks: Sequence[Task], fingerprints: Mapping[str, str], *, folder: Path | None, entries: str, processes: int
) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yield name, target and figures ({"error": reason} where it did not compile) of each task, as they finish.

    Args:
        tasks: what to compile.
        fingerprints: name -> what its fingerprint must be: the sources are read anew, and may have changed by then.
        folder: holds the release of triton to use; the installed one where None.
        entries: module whose `compilations()` lists what the tasks name.
        processes: how many compile at once.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    paths = [str(path) for path in (folder, ROOT, environment.get("PYTHONPATH")) if path]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", "bench.aot.compiler", entries, str(processes)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(json.dumps({"tasks": tasks, "fingerprints": fingerprints}))
        worker.stdin.close()
        for line in worker.stdout:
            name, target, figures = json.loads(line)
            yield name, target, figures
    if worker.returncode:
        sys.exit(worker.returncode)  # which has said why


def listed(entries: str) -> dict[str, Compilation]:
    """Return the compilations of a module by name.

    Raises:
        ValueError: two have the same name.
    """
    by_name: dict[str, Compilation] = {}
    for compilation in importlib.import_module(entries).compilations():
        if compilation.name in by_name:
            raise ValueError(f"two compilations are named {compilation.name!r}.")
        by_name[compilation.name] = compilation
    return by_name


def main() -> None:
    """Compile what standard input lists, and print a line of figures for each task."""
    entries, processes = sys.argv[1], int(sys.argv[2])
    compilations = listed(entries)
    request = json.load(sys.stdin)
    for name, fingerprint in request["fingerprints"].items():
        if compilations[name].fingerprint() != fingerprint:
            sys.exit(f"error: {name} changed while others were compiled: run again.")
    waiting: list[Task] = request["tasks"][::-1]
    running: dict[Connection, tuple[Task, multiprocessing.process.BaseProcess, Path]] = {}
    fork = multiprocessing.get_context("fork")  # a child has torch and triton imported already
    with tempfile.TemporaryDirectory() as logs:
        while waiting or running:
            while waiting and len(running) < processes:
                task = name, target = waiting.pop()
                receiver, sender = fork.Pipe(duplex=False)
                log = Path(logs) / str(len(waiting))
                child = fork.Process(target=_compile, args=(compilations[name], target, sender, log))
                child.start()
                sender.close()
                running[receiver] = task, child, log
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                task, process, log = running.pop(ready)
                try:
                    figures = ready.recv()
                except EOFError:
                    process.join()
                    figures = {"error": _reason(log.read_text(), f"the compiler died with exit code {process.exitcode}")}
                ready.close()
                process.join()
                print(json.dumps([*task, figures]), flush=True)


def _compile(compilation: Compilation, target: str, sender: Connection, log: Path) -> None:
    """In the child: send the figures, or why there are none; what compilers print goes to the log."""
    with log.open("w") as stream:
        os.dup2(stream.fileno(), sys.stderr.fileno())
        os.dup2(stream.fileno(), sys.stdout.fileno())
    try:
        sender.send(_figures(compilation, target))
    except Exception as failure:  # noqa: BLE001 compilers raise anything
        sender.send({"error": _reason(log.read_text(), f"{type(failure).__name__}: {failure}")})


def _figures(compilation: Compilation, target: str) -> dict[str, object]:
    import triton

    from bench.aot.binary import amd_figures, nvidia_figures

    compiled = triton.compile(compilation.source(), target=TARGETS[target], options=dict(compilation.options))
    if "cubin" in compiled.asm:
        return nvidia_figures(target, compiled.asm["cubin"], compiled.metadata)
    return amd_figures(target, compiled.asm["amdgcn"], compiled.metadata)


def _reason(log: str, otherwise: str) -> str:
    """The compiler's first error in one line, the same on every machine: without line numbers, which move, and folders."""
    match = re.search(r"(?:error *: |fatal *: |Assertion )(.*)", log + otherwise)
    lines = [line.strip() for line in otherwise.splitlines() if line.strip(" ^")]
    return re.sub(r"(?:/[\w.+-]+)+/", "", match[1] if match else lines[-1])[:200]


if __name__ == "__main__":
    main()
