"""Launch configurations of the attention kernels, read from the table `tuned.json`, which `python -m bench.tune` makes.

A row of the table holds for one kind of device, heads of up to one width, one dtype and one kind of length distribution:

{"capability": "9.0", "width": 128, "dtype": "bfloat16", "distribution": "long", "query_rows": 128, "key_rows": 128,
 "forward": {"step": 64, "warps": 8, "stages": 3}, "dq": {...}, "dk_dv": {...},
 "measured": false, "device": null, "commit": null}

capability: the compute capability, or the architecture's name on AMD ("gfx942").
distribution: "long" where wide tiles are worth it, "short" where most of their area would be invisible.
query_rows, key_rows: rows of a tile of the forward and the dQ kernel, and of the dK/dV kernel.
measured: whether the row was the fastest of a sweep on `device` at `commit`; else static counts of the binaries chose it.

A device that is not in the table takes the rows of the newest capability that is no newer than its own, or else of the
oldest one. Heads take the rows of the narrowest width that holds them, float16 those of bfloat16. For tiles of other sizes,
heads wider than the table knows, float32 and Triton's interpreter there is a rule, `unlisted`, which nobody has measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("tuned.json")
DISTRIBUTIONS = ("long", "short")
KERNELS = ("forward", "dq", "dk_dv")
COMMON_WIDTH = 128  # of heads, for plans whose maker does not say

Sizes = tuple[int, int, int, int]  # query_rows, key_step, key_rows, query_step, as in `Tiles`
Key = tuple[str, int, str, str]  # capability, width, dtype, distribution


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched.

    Attributes:
        step: keys, or queries of dK/dV, that an iteration takes; a power of two that divides the plan's.
        warps: of a block.
        stages: of the pipeline of loads.
    """

    step: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configuration:
    """A row of the table without its key; see the module."""

    query_rows: int
    key_rows: int
    forward: Launch
    dq: Launch
    dk_dv: Launch
    measured: bool = False
    device: str | None = None
    commit: str | None = None

    @property
    def sizes(self) -> Sizes:
        """Tile sizes of a plan for these launches."""
        return self.query_rows, max(self.forward.step, self.dq.step), self.key_rows, self.dk_dv.step


def parsed(rows: Iterable[Mapping[str, Any]]) -> dict[Key, Configuration]:
    """Return the rows of a table by key.

    Raises:
        ValueError: naming a row that comes twice, or has an unknown distribution or a size that is no power of two.
        TypeError: a row lacks a key or has an unknown one.
    """
    table: dict[Key, Configuration] = {}
    for row in rows:
        values = dict(row)
        key: Key = values.pop("capability"), values.pop("width"), values.pop("dtype"), values.pop("distribution")
        configuration = Configuration(**values | {kernel: Launch(**values[kernel]) for kernel in KERNELS})
        powers = [configuration.query_rows, configuration.key_rows, *(getattr(configuration, it).step for it in KERNELS)]
        if key in table or key[3] not in DISTRIBUTIONS or any(size < 16 or size & (size - 1) for size in powers):
            problem = "comes twice, or has an unknown distribution or a size that is no power of two"
            raise ValueError(f"{PATH.name}: row {key} {problem}")
        table[key] = configuration
    return table


@cache
def table() -> dict[Key, Configuration]:
    """Return the package's table."""
    return parsed(json.loads(PATH.read_text()))


@cache
def architecture(device: torch.device) -> str:
    """Return the capability of a CUDA device or the name of an AMD one, as in the table; "" for other devices."""
    if device.type != "cuda":
        return ""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def configuration(device: torch.device, head_width: int, dtype: torch.dtype, sizes: Sizes) -> Configuration:
    """Return the table's row for tiles of these sizes, or what the rule says where there is none."""
    return _configuration(architecture(device), head_width, dtype, sizes)


def sizes_of_plans(device: torch.device, head_width: int | None = None) -> tuple[Sizes, Sizes] | None:
    """Return tile sizes for long and for short documents; None where the table has none for a device."""
    rows = _rows(architecture(device), head_width or COMMON_WIDTH, torch.bfloat16)
    return (rows[0].sizes, rows[1].sizes) if rows else None


def provenance(device: torch.device, head_width: int, dtype: torch.dtype) -> str:
    """Return on what the tiles and launches for a device were measured, or "unmeasured"."""
    rows = _rows(architecture(device), head_width, dtype)
    if not rows or not all(row.measured for row in rows):
        return "unmeasured"
    return f"measured on {' and '.join(sorted({str(row.device) for row in rows}))}"


def unlisted(head_width: int, dtype: torch.dtype, sizes: Sizes) -> Configuration:
    """Return launches for tiles that the table does not have.

    Four warps hold 64 rows of one accumulator, or of the two of dK/dV where heads are no wider than 64. Wide heads and
    float32 have one stage, so that the tiles fit into shared memory.
    """
    query_rows, key_step, key_rows, query_step = sizes
    query_warps = 8 if query_rows >= 128 else 4
    key_warps = 8 if key_rows >= 128 or head_width > 64 else 4
    small = head_width <= 128 and dtype != torch.float32
    forward_stages = (3 if query_rows >= 128 else 2) if small else 1
    stages = 2 if small else 1
    return Configuration(
        query_rows,
        key_rows,
        Launch(key_step, query_warps, forward_stages),
        Launch(key_step, query_warps, stages),
        Launch(query_step, key_warps, stages),
    )


@cache
def _configuration(name: str, head_width: int, dtype: torch.dtype, sizes: Sizes) -> Configuration:
    rows = _rows(name, head_width, dtype) or ()
    return next((row for row in rows if row.sizes == sizes), unlisted(head_width, dtype, sizes))


@cache
def _rows(name: str, head_width: int, dtype: torch.dtype) -> tuple[Configuration, Configuration] | None:
    """Rows for long and for short documents on an architecture; None where there are none."""
    kind = {torch.bfloat16: "bfloat16", torch.float16: "bfloat16"}.get(dtype)
    capability = _nearest(name, {key[0] for key in table()})
    widths = sorted(key[1] for key in table() if key[0] == capability and key[1] >= head_width and key[2] == kind)
    if not widths or kind is None or capability is None:
        return None
    long, short = (table()[capability, widths[0], kind, distribution] for distribution in DISTRIBUTIONS)
    return long, short


def _nearest(name: str, capabilities: Iterable[str]) -> str | None:
    if not name or name in capabilities:
        return name or None
    if name.startswith("gfx"):
        return min((it for it in capabilities if it.startswith("gfx")), default=None)
    numbers = sorted((float(it), it) for it in capabilities if not it.startswith("gfx"))
    older = [it for number, it in numbers if number <= float(name)]
    return older[-1] if older else numbers[0][1] if numbers else None
