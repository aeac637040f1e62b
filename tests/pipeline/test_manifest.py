"""Manifests: believed only as they were written, with the files that they list and no others."""

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import atomic_open, read_json, write_json
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage

QUIET = Console(quiet=True)


def stage(out: Path, *, force: bool = False, text: str = "whole") -> Manifest:
    def body(context: StageContext) -> None:
        with atomic_open(context.directory / "a.txt") as file:
            file.write(text.encode())
        context.record(loss=5.25)

    return run_stage("count", out, config={"size": 1}, inputs={}, body=body, console=QUIET, force=force)


def change(key: str, value: Any) -> Any:
    def mutate(directory: Path) -> None:
        write_json(directory / "manifest.json", read_json(directory / "manifest.json") | {key: value})

    return mutate


@pytest.mark.parametrize(
    "mutate",
    [
        change("counts", {"loss": 4.25}),
        change("flops", 1.0),
        change("inputs", {"corpus": "x"}),
        change("files", {}),
        change("xxh3", "0"),
        change("extra", 1),
        change("config", None),
        change("format", None),
        lambda directory: (directory / "manifest.json").write_text("[]"),
        lambda directory: (directory / "manifest.json").write_text("[" * 10**6),
        lambda directory: (directory / "manifest.json").write_bytes(b"\xff"),
        lambda directory: (directory / "manifest.json").write_text('{"format": NaN}'),
    ],
)
def test_changed_manifest_is_refused_by_its_name(tmp_path: Path, mutate: Any) -> None:
    stage(tmp_path / "out")
    mutate(tmp_path / "out")
    for read in (Manifest.read, Manifest.load, stage):
        with pytest.raises(UserError, match=r"manifest\.json: ") as refused:
            read(tmp_path / "out")
        assert len(str(refused.value)) < 400


def test_every_flipped_bit_of_a_manifest_is_refused_or_changes_no_value(tmp_path: Path) -> None:
    whole, path = stage(tmp_path / "out"), tmp_path / "out" / "manifest.json"
    content, dice = path.read_bytes(), random.Random(0)
    for bit in dice.sample(range(8 * len(content)), 400):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with suppress(UserError):
            assert Manifest.read(tmp_path / "out") == whole


def test_file_that_the_manifest_does_not_list_is_refused_by_its_name(tmp_path: Path) -> None:
    stage(tmp_path / "out")
    (tmp_path / "out" / "b.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.npy: is not part of the output"):
        Manifest.load(tmp_path / "out", hashed=False)
    with pytest.raises(UserError, match=r"b\.npy"):
        stage(tmp_path / "out", force=True)  # it may be somebody's: nothing is removed
    assert (tmp_path / "out" / "b.npy").exists()


def test_damaged_output_is_made_again_with_force_alone(tmp_path: Path) -> None:
    whole = stage(tmp_path / "out")
    (tmp_path / "out" / "a.txt").write_text("holes")
    with pytest.raises(UserError, match=r"a\.txt: missing or damaged.*--force"):
        stage(tmp_path / "out")
    assert stage(tmp_path / "out", force=True).files == whole.files


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("nan")], {"low": float("-inf")}])
def test_counts_that_are_not_finite_are_refused_by_their_key(tmp_path: Path, value: Any) -> None:
    def body(context: StageContext) -> None:
        context.record(band={"ends": value})

    with pytest.raises(UserError, match=r"out: band\.ends.* is not finite"):
        run_stage("pair", tmp_path / "out", config={}, inputs={}, body=body, console=QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", "[" * 100_000, "", '{"a": 1'])
def test_json_that_is_not_finite_or_none_at_all_is_refused_by_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json: is not JSON"):
        read_json(tmp_path / "a.json")


def test_json_with_nan_is_not_written_and_the_old_file_stays(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(UserError, match=r"a\.json: rates\.1 is not finite: nan"):
        write_json(tmp_path / "a.json", {"rates": [0.5, float("nan")]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
