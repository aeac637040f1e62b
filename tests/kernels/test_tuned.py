"""The table of launch configurations: its rows, what devices without a row take, and what is said of measurement."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sbp_kernels import PackedLayout, _tuned, backend_provenance
from sbp_kernels._tuned import Launch
from sbp_kernels.layout.plan import NARROW, WIDE, Tiles, choose_tiles

BF16 = torch.bfloat16
GPU = torch.device("cuda")
ROW = json.loads(_tuned.PATH.read_text())[0]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A call that sets the architecture of every device, and rows of the table if given."""

    def on(name: str, rows: list[dict[str, Any]] | None = None) -> None:
        monkeypatch.setattr(_tuned, "architecture", lambda device: name)
        if rows is not None:
            found = _tuned.parsed(rows)
            monkeypatch.setattr(_tuned, "table", lambda: found)
        forget()

    yield on
    monkeypatch.undo()
    forget()


def forget() -> None:
    _tuned._rows.cache_clear()
    _tuned._configuration.cache_clear()


def rows_of(capability: str, width: int, **changes: Any) -> list[dict[str, Any]]:
    key = {"capability": capability, "width": width}
    return [ROW | key | {"distribution": it} | changes for it in _tuned.DISTRIBUTIONS]


def test_every_capability_and_width_has_rows_for_both_kinds_of_documents() -> None:
    keys = _tuned.table().keys()
    assert {key[0] for key in keys} == {"8.0", "9.0", "10.0", "gfx942"}
    assert {(*key[:3], it) for key in keys for it in _tuned.DISTRIBUTIONS} == set(keys)


@pytest.mark.parametrize(
    "rows",
    [
        [ROW, ROW],
        [ROW | {"distribution": "middling"}],
        [ROW | {"query_rows": 96}],
        [ROW | {"dq": {"step": 8, "warps": 4, "stages": 2}}],
    ],
)
def test_rows_that_are_doubled_or_have_impossible_sizes_raise(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="comes twice"):
        _tuned.parsed(rows)


def test_rows_with_unknown_keys_raise() -> None:
    with pytest.raises(TypeError, match="speed"):
        _tuned.parsed([ROW | {"speed": 1}])


@pytest.mark.parametrize(
    ("name", "width", "dtype", "row"),
    [
        ("9.0", 128, BF16, ("9.0", 128)),
        ("9.0", 96, torch.float16, ("9.0", 128)),
        ("9.0", 16, BF16, ("9.0", 64)),
        ("8.9", 64, BF16, ("8.0", 64)),
        ("12.0", 64, BF16, ("9.0", 64)),
        ("7.5", 64, BF16, ("8.0", 64)),
        ("gfx950", 64, BF16, ("gfx942", 64)),
        ("9.0", 256, BF16, None),
        ("9.0", 128, torch.float32, None),
        ("", 128, BF16, None),
    ],
)
def test_devices_widths_and_dtypes_take_the_nearest_row(
    on: Any, name: str, width: int, dtype: torch.dtype, row: tuple[str, int] | None
) -> None:
    kinds = [(capability, width) for capability in ("8.0", "9.0", "gfx942") for width in (64, 128)]
    on(name, [it for kind in kinds for it in rows_of(*kind, device=f"{kind}")])
    found = _tuned._rows(name, width, dtype)
    assert (found and found[0].device) == (row and f"{row}")


def test_launches_of_a_row_may_take_part_of_the_plans_step(on: Any) -> None:
    on("9.0", rows_of("9.0", 128, forward={"step": 32, "warps": 4, "stages": 4}, dq={"step": 64, "warps": 4, "stages": 1}))
    long, _ = _tuned.sizes_of_plans(GPU, 128) or ()
    assert long[1] == 64
    found = _tuned.configuration(GPU, 128, BF16, long)
    assert (found.forward, found.dq) == (Launch(32, 4, 4), Launch(64, 4, 1))


def test_tiles_that_no_row_has_are_launched_by_the_rule(on: Any) -> None:
    on("9.0")
    found = _tuned.configuration(GPU, 128, BF16, (64, 16, 128, 16))
    assert found == _tuned.unlisted(128, BF16, (64, 16, 128, 16))
    assert (found.forward, found.dk_dv, found.measured) == (Launch(16, 4, 2), Launch(16, 8, 2), False)
    assert _tuned.unlisted(256, BF16, (128, 64, 64, 32)).forward == Launch(64, 8, 1)


def test_plans_for_a_device_have_the_sizes_of_its_rows(on: Any) -> None:
    rows = rows_of("9.0", 128)
    rows[0] |= {"query_rows": 256, "key_rows": 64}
    on("9.0", rows)
    wide, narrow = (Tiles(*sizes) for sizes in _tuned.sizes_of_plans(GPU) or ())
    assert wide.query_rows == 256 and wide.key_rows == 64
    planned = PackedLayout.from_lengths([4000]).planned("cuda").plan
    assert planned is not None and planned.tiles == wide
    assert choose_tiles(PackedLayout.from_lengths([16] * 100).visible_until.numpy(), wide, narrow) == narrow
    on("")
    planned = PackedLayout.from_lengths([4000]).planned().plan
    assert planned is not None and planned.tiles == WIDE != NARROW


def test_what_is_not_measured_is_said(on: Any) -> None:
    on("9.0", rows_of("9.0", 128))
    assert backend_provenance("triton", GPU, 128) == "unmeasured" and backend_provenance("torch", "cpu", 128) == ""
    on("9.0", rows_of("9.0", 128, measured=True, device="NVIDIA H200"))
    assert backend_provenance("triton", GPU, 128) == "measured on NVIDIA H200"
    assert backend_provenance("triton", GPU, 128, torch.float32) == "unmeasured"
    on("9.0", [ROW | {"capability": "9.0", "width": 128, "distribution": "short"}, *rows_of("9.0", 128, measured=True)[:1]])
    assert backend_provenance("triton", GPU, 128) == "unmeasured"


def test_the_table_travels_with_the_package() -> None:
    assert _tuned.PATH.parent == Path(_tuned.__file__).parent
    assert all(replace(row).sizes for row in _tuned.table().values())
