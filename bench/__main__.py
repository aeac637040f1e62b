"""`python -m bench [OPERATION ...]`: check, time side by side, and keep the figures as JSON, written as they come."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench import machine, records
from bench.registry import OPERATIONS
from bench.runner import measure


def main() -> None:
    parser = records.parser("bench", __doc__)
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(OPERATIONS)}; all by default")
    asked = parser.parse_args()
    unknown = set(asked.operations) - OPERATIONS.keys()
    if unknown:
        parser.error(f"no operation {', '.join(sorted(unknown))}: choose from {', '.join(OPERATIONS)}")
    ends = time.monotonic() + asked.budget
    names = asked.operations or list(OPERATIONS)
    for index, name in enumerate(names):
        share = (ends - time.monotonic()) / (len(names) - index)
        run(name, records.path_of(asked.out, name), share)
    if machine.device().type == "cpu":
        print("Left out on this machine, which has no GPU: the kernels in Triton, and every peer that needs CUDA.")


def run(name: str, path: Path, seconds: float) -> None:
    """Measure the operation's cases, the important ones first, for about `seconds`; what is written so far stays."""
    ends = time.monotonic() + seconds
    record = records.record_of(name)
    cases = sorted(OPERATIONS[name](), key=lambda case: case.importance)
    for case in cases:
        if time.monotonic() > ends:
            break
        record["cases"].append(measure(case))
        records.save(path, record)
    show(name, record["cases"])
    if len(record["cases"]) < len(cases):
        print(f"{len(cases) - len(record['cases'])} of {len(cases)} cases of {name} left out: the time was over")
    print(path)


def show(name: str, cases: list[dict[str, Any]]) -> None:
    """A plain table: nothing but torch is needed on a machine that only measures kernels."""
    print(f"\n{name} on {machine.device_name()}")
    for case in cases:
        print("\n" + ", ".join(f"{key} {value}" for key, value in case["shape"].items()))
        if not case["check"]["right"]:
            print("    WRONG against float64: no speed is shown")
            continue
        limit = max(case["flops"] / case["limits"]["flops"], case["bytes"] / case["limits"]["bytes"])
        for provider, (_, median, _) in case["seconds"].items():
            rate = f"{case['work'] / median:.4g} {case['unit']}/s"
            share = f"{limit / median:.0%} of the limit" if limit else ""
            ratio = "ours is {1:.2f}x as fast ({0:.2f} to {2:.2f})".format(*case["speed_up"].get(provider, (1, 1, 1)))
            memory = f"{case['memory'][provider] / 1e6:.0f} MB" if case["memory"][provider] is not None else ""
            versus = ratio if provider in case["speed_up"] else ""
            print(f"    {provider:32}{median * 1e3:>10.3f} ms  {rate:>26}  {share:>18}  {memory:>10}  {versus}")
        for fact, value in case["facts"].items():
            print(f"    {fact}: {value:.3g}")
        for provider, reason in case["left_out"].items():
            print(f"    {provider} left out: {reason}")


if __name__ == "__main__":
    main()
