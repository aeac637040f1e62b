"""Figures of a compiled kernel, read from its binary.

Figures of one binary, as in the table:
    registers: of 32 bits, of one thread (on AMD vector registers, accumulation registers included).
    spill_bytes: read and written per thread by spill code, each instruction counted once.
    local_bytes: stack and local memory (on AMD scratch) of one thread.
    shared_bytes: shared memory of one block.
    tensor_memory_columns: of one block, on sm_100.
    warps: of one block, those that warp specialisation adds included.
    blocks: that fit on a multiprocessor at once.
    products_in_flight: the most products of warp groups that run at once, on sm_90.
    covered_exponentials: exponentials that are computed while such a product runs; the others wait for all of them.
    instructions: counts of the kinds in `NVIDIA_KINDS` or `AMD_KINDS`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

from bench.aot.occupancy import blocks_per_multiprocessor

Figures = dict[str, Any]

# kind -> opcodes (NVIDIA SASS, up to the first dot) or beginnings of opcodes (AMD) that it counts
NVIDIA_KINDS = {
    "HMMA": {"HMMA"},
    "HGMMA": {"HGMMA"},  # of a whole warpgroup: sm_90
    "UTCMMA": {"UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA"},  # tcgen05.mma: sm_100
    "UTMALDG": {"UTMALDG"},  # a tile from global memory by the tensor memory accelerator
    "UTMASTG": {"UTMASTG"},
    "UTMAREDG": {"UTMAREDG"},
    "LDGSTS": {"LDGSTS"},  # cp.async
    "BAR": {"BAR"},
    "MUFU": {"MUFU"},  # exponentials, reciprocals, square roots
    "USETMAXREG": {"USETMAXREG"},  # registers handed from one warpgroup to another: warps are specialised
    "atomics": {"ATOM", "ATOMG", "RED", "REDG"},
}
AMD_KINDS = {
    "MFMA": ("v_mfma", "v_smfma"),
    "barriers": ("s_barrier",),
    "transcendentals": ("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_"),
    "atomics": ("global_atomic", "buffer_atomic", "flat_atomic"),
}
OPCODE = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)", re.MULTILINE)


def nvidia_figures(target: str, cubin: bytes, metadata: Any) -> Figures:
    """Return the figures of a cubin, from what the disassembler prints."""
    figures, count = cubin_figures(cubin)
    figures |= {
        "shared_bytes": metadata.shared,
        "tensor_memory_columns": getattr(metadata, "tmem_size", 0),
        "warps": metadata.num_warps,
    }
    return _completed(target, figures, {kind: sum(count[name] for name in names) for kind, names in NVIDIA_KINDS.items()})


def cubin_figures(cubin: bytes) -> tuple[Figures, Counter[str]]:
    """Return what a cubin alone tells of its kernel: registers, spills and local memory, and how often each opcode stands."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = _tool("cuobjdump", "-res-usage", path), _tool("nvdisasm", "-c", path)
    opcodes = OPCODE.findall(code)
    resources = usage_of(usage)
    figures: Figures = {
        "registers": resources["REG"],
        "spill_bytes": sum(access_bytes(suffixes) for opcode, suffixes in opcodes if opcode in ("STL", "LDL")),
        "local_bytes": resources["STACK"] + resources["LOCAL"],
    }
    in_flight, covered = products_in_flight(code)
    if in_flight:
        figures |= {"products_in_flight": in_flight, "covered_exponentials": covered}
    return figures, Counter(opcode for opcode, _ in opcodes)


def products_in_flight(code: str) -> tuple[int, int]:
    """Return the most products of warp groups that run at once, and the exponentials that are computed while one runs.

    The code is walked once, and each loop in it a second time, since a product may run on into the next iteration.
    An instruction with "gsb0" ends a product; `WARPGROUP.DEPBAR.LE gsb0, n` waits until n of them are left.
    """
    lines = code.splitlines()
    labels = {line.strip()[:-1]: index for index, line in enumerate(lines) if line.strip().endswith(":")}
    repeated: set[int] = set()
    covered: set[int] = set()
    running = most = index = 0
    while index < len(lines):
        line = lines[index]
        if "HGMMA" in line and "gsb0" in line:
            running += 1
            most = max(most, running)
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", line):
            running = min(running, int(wait[1], 16))
        elif "MUFU.EX2" in line and running:
            covered.add(index)
        branch = re.search(r"\bBRA\S* .*?`\((\S+)\)", line)
        target = labels.get(branch[1], index) if branch else index
        if target < index and index not in repeated:
            repeated.add(index)
            index = target
        index += 1
    return most, len(covered)


def amd_figures(target: str, assembly: str, metadata: Any) -> Figures:
    """Return the figures of an AMD kernel from the assembly that LLVM emits, which ends with the kernel's metadata."""

    def resource(name: str) -> int:
        return int(re.findall(rf"^\s+(?:- )?\.{name}:\s*(\d+)$", assembly, re.MULTILINE)[-1])

    figures = {
        "registers": resource("vgpr_count"),
        "spill_bytes": 4 * resource("vgpr_spill_count"),
        "local_bytes": resource("private_segment_fixed_size"),
        "shared_bytes": metadata.shared + resource("group_segment_fixed_size"),
        "warps": metadata.num_warps,
    }
    scalars = {"scalar_registers": resource("sgpr_count"), "scalar_spills": resource("sgpr_spill_count")}
    opcodes = re.findall(r"^\t([a-z]\w+)", assembly, re.MULTILINE)
    counts = {kind: sum(opcode.startswith(starts) for opcode in opcodes) for kind, starts in AMD_KINDS.items()}
    return _completed(target, figures, counts) | scalars


def _completed(target: str, figures: Figures, counts: dict[str, int]) -> Figures:
    blocks = blocks_per_multiprocessor(
        target,
        warps=figures["warps"],
        registers=figures["registers"],
        shared_bytes=figures["shared_bytes"],
        tensor_memory_columns=figures.get("tensor_memory_columns", 0),
    )
    kinds = {kind: count for kind, count in counts.items() if count}
    return {key: value for key, value in figures.items() if value or key != "tensor_memory_columns"} | {
        "blocks": blocks,
        "instructions": kinds,
    }


def usage_of(report: str) -> dict[str, int]:
    """Return the numbers of the kernel's line in what `cuobjdump -res-usage` prints.

    Raises:
        ValueError: there is no such line.
    """
    line = re.search(r"Function .*\n\s*(REG:.*)", report)
    if line is None:
        raise ValueError(f"cuobjdump printed no resource usage: {report!r}")
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line[1])}


def access_bytes(suffixes: str) -> int:
    """Return the bytes that an access to local memory moves per thread, from the suffixes of its opcode: ".64", ".LU.128"."""
    widths = {"8": 1, "U8": 1, "S8": 1, "16": 2, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((widths[part] for part in suffixes.split(".") if part in widths), 4)


def _tool(name: str, *arguments: str | Path) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
