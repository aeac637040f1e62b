"""Run tests as the processors that torch and oneDNN can be told to be: `python tests/support/each_cpu.py PYTEST_ARGUMENTS`.

A kind of processor that this machine's does not contain is named and not run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SETTINGS: tuple[tuple[str, str, str], ...] = (  # environment variable, its value, the flag of the processor that it needs
    ("", "", ""),
    ("ATEN_CPU_CAPABILITY", "default", ""),
    ("ATEN_CPU_CAPABILITY", "avx2", "avx2"),
    ("ATEN_CPU_CAPABILITY", "avx512", "avx512f"),
    ("ONEDNN_MAX_CPU_ISA", "AVX2", "avx2"),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", "avx512_bf16"),
)


def processor() -> tuple[str, set[str]]:
    """Name and flags of this machine's processor, as Linux gives them; an empty set elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line) if path.exists() else {}
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    return fields.get("model name", "unknown processor"), set(fields.get("flags", "").split())


def main() -> int:
    name, flags = processor()
    summary, failed = [], False
    for variable, value, needed in SETTINGS:
        setting = f"{variable}={value}" if variable else "no setting"
        if needed and needed not in flags:
            summary.append(f"{setting}: not run, {name} has no {needed}")
            continue
        environment = {key: x for key, x in os.environ.items() if key not in {row[0] for row in SETTINGS}}
        print(f"=== {name}, {setting}", flush=True)
        status = subprocess.call(
            [sys.executable, "-m", "pytest", *sys.argv[1:]], env=environment | ({variable: value} if variable else {})
        )
        summary.append(f"{setting}: {'passed' if status == 0 else f'FAILED, exit code {status}'}")
        failed |= status != 0
    print("\n".join([f"=== {name}", *summary]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
