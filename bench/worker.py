"""`python -m bench.worker`: measure the cases of one benchmark in a process that `bench.supervisor` can lose.

Standard input holds a `Request` as JSON. Standard output gets one JSON event a line, flushed:

{"environment": {...}}                                            once, before the first case
{"case": index, "row": {...}, "providers": [...], "done": false}  a case begins, or has figures so far
{"case": index, "row": {...}, "providers": [...], "done": true}   a case is measured
{"case": index, "provider": name, "step": step}                   a step begins that may end this process
{"lost": reason}                                                  the provider of the last step broke the CUDA context
{"missing": reason}                                               a package that the benchmark needs is not installed
{"end": true}                                                     all cases were reached; false: the time was over

What providers print goes to standard error.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from bench import machine, records
from bench.case import Case
from bench.registry import Benchmark
from bench.runner import DeviceLost, described, failure, measure


@dataclass(frozen=True)
class Request:
    """Cases to measure.

    Attributes:
        cases: "module:function", as registered.
        seconds: time limit; the case that is reached last is still completed.
        pattern: regular expression; only cases are measured whose title it is found in.
        providers: names of the only providers to time, the first present one being ours; all where empty.
        first: index of the first case to measure.
        left_out: providers that must not run, with the reasons.
    """

    cases: str
    seconds: float = math.inf
    pattern: str = ""
    providers: tuple[str, ...] = ()
    first: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)


def chosen(cases: Iterator[Case], request: Request) -> Iterator[tuple[int, Case]]:
    """Yield index and case of the cases to measure, with the providers to time.

    The check of a case keeps all of its providers, some of which bound our error.
    """
    for index, case in enumerate(cases):
        if index < request.first or not re.search(request.pattern, records.title({"shape": case.shape})):
            continue
        if request.providers:
            providers = {name: case.providers[name] for name in case.providers if name in request.providers}
            case = replace(case, providers=providers, check=case.check or case)
        if machine.tiny():
            case = replace(case, schedule=replace(case.schedule, rounds=2, min_rounds=1, repeats=1))
        if case.providers:
            yield index, case


def main() -> None:
    """Measure what standard input asks for."""
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        work(Request(**json.load(sys.stdin)), events)
    except ImportError as error:
        _send(events, {"missing": str(error)})
    except DeviceLost as error:
        _send(events, {"lost": str(error)})


def work(request: Request, events: TextIO) -> None:
    """Measure the cases and send the events.

    Raises:
        ImportError: a package that the benchmark needs is not installed.
        DeviceLost: a provider left the CUDA context of this process broken.
    """
    cases = chosen(Benchmark(request.cases).load()(), request)
    _send(events, {"environment": machine.environment()})
    ends = time.monotonic() + request.seconds
    while time.monotonic() <= ends:
        index, case = next(cases, (-1, None))
        if case is None:
            break
        _measure(index, case, ends - time.monotonic(), request, events)
        machine.release_memory()
    else:
        _send(events, {"end": False})
        return
    _send(events, {"end": True})


def _measure(index: int, case: Case, seconds: float, request: Request, events: TextIO) -> None:
    def send(row: Mapping[str, Any], done: bool = False) -> None:
        _send(events, {"case": index, "row": row, "providers": list(case.providers), "done": done})

    def watch(name: str, step: str) -> None:
        _send(events, {"case": index, "provider": name, "step": step})

    send({**described(case), **failure("the process ended before the case did", {})})
    send(measure(case, seconds, send, watch, request.left_out), done=True)


def _send(events: TextIO, event: Mapping[str, Any]) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


if __name__ == "__main__":
    main()
