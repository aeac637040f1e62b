"""Rules that a binary must meet, and figures that may not get worse."""

from __future__ import annotations

from typing import Any

from bench.aot.binary import Figures
from bench.aot.compilation import Compilation

# target -> instructions of which one must be there, and instructions that may not be there
TENSOR_CORES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sm_80": (("HMMA",), ()),
    "sm_90": (("HGMMA",), ("HMMA",)),
    "sm_100": (("UTCMMA", "HMMA"), ()),
    "gfx942": (("MFMA",), ()),
}
MAY_NOT_GROW = ("spill_bytes", "local_bytes", "scalar_spills")
MAY_NOT_VANISH = ("HMMA", "HGMMA", "UTCMMA", "MFMA", "UTMALDG", "UTMASTG", "UTMAREDG", "LDGSTS", "USETMAXREG")
MAY_NOT_APPEAR = ("atomics",)
MAY_NOT_SHRINK = ("blocks", "products_in_flight")


def failures(compilation: Compilation, release: str, target: str, figures: Figures) -> list[str]:
    """Return what the entry requires and the binary does not meet, a line each."""
    if compilation.requires.why_impossible(release, target) is not None:
        return []
    if "error" in figures:
        return [f"does not compile: {figures['error']}"]
    requires, instructions = compilation.requires, figures["instructions"]
    failed = []
    if not figures["blocks"]:
        failed.append(f"cannot be launched: {figures['registers']} registers, {figures['shared_bytes']} bytes of shared memory")
    allowed = requires.spill_bytes.get(target, 0)
    if figures["spill_bytes"] > allowed:
        failed.append(f"spills {figures['spill_bytes']} bytes, {allowed} allowed")
    elif figures["local_bytes"] and not allowed:
        failed.append(f"uses {figures['local_bytes']} bytes of local memory")
    if instructions.get("atomics") and not requires.atomics:
        failed.append(f"has {instructions['atomics']} atomics")
    if requires.tensor_cores:
        some, none = TENSOR_CORES[target]
        if not any(kind in instructions for kind in some):
            failed.append(f"has no {' or '.join(some)}: no product runs on tensor cores")
        failed += [f"has {instructions[kind]} {kind}, the slower form" for kind in none if kind in instructions]
    missing = [kind for kind in requires.instructions.get(target, ()) if kind not in instructions]
    return failed + [f"has no {kind}, which the entry promises" for kind in missing]


def differences(before: Figures, after: Figures) -> tuple[list[str], list[str]]:
    """Return regressions, then all other changes, of one binary against its figures in the table."""
    if "error" in before or "error" in after:
        if before == after:
            return [], []
        text = f"{_outcome(before)} -> {_outcome(after)}"
        return ([text], []) if "error" not in before else ([], [text])
    worse: list[str] = []
    other: list[str] = []
    for name, (old, new) in _pairs(before, after).items():
        if old == new:
            continue
        grew = name in MAY_NOT_GROW and new > old
        vanished = name in MAY_NOT_VANISH and not new
        appeared = name in MAY_NOT_APPEAR and not old
        fewer = name in MAY_NOT_SHRINK and new < old
        (worse if grew or vanished or appeared or fewer else other).append(f"{name.replace('_', ' ')} {old} -> {new}")
    return worse, other


def _pairs(before: Figures, after: Figures) -> dict[str, tuple[Any, Any]]:
    """Every figure of either, instructions among them, with its two values."""
    flat = [{**figures, **figures["instructions"]} for figures in (before, after)]
    names = sorted((flat[0].keys() | flat[1].keys()) - {"instructions"})
    return {name: (flat[0].get(name, 0), flat[1].get(name, 0)) for name in names}


def _outcome(figures: Figures) -> str:
    return f"does not compile ({figures['error']})" if "error" in figures else "compiles"
