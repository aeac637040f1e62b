"""The whole experiment, tiny: it ends, it resumes, and a kill changes nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.experiment.graph import stages_of
from sbp_fast.experiment.run import run
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.train.log import read_curve

STAGES = tuple(stages_of(load_config(["small"], TINY)))
QUIET = Console(quiet=True)


def fingerprints(out: Path) -> dict[str, str]:
    return {stage: Manifest.load(out / stage).fingerprint for stage in STAGES}


def without_seconds(value: Any) -> Any:
    """`results.json` without what the wall clock decides."""
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if "seconds" not in key}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def results(out: Path) -> Any:
    return without_seconds(json.loads((out / "results.json").read_text()))


def test_run_finishes_every_stage_with_matched_arms(tiny_config: RunConfig, tiny_run: Path) -> None:
    fingerprints(tiny_run)
    arms = results(tiny_run)["arms"]
    assert arms.keys() == {"baseline", "sbp", "oracle"}
    tokens = [arm["tokens"] for arm in arms.values()]
    assert tokens == [tiny_config.pretrain.tokens] * 3
    assert arms["sbp"]["synthetic_tokens"] > 0
    assert arms["oracle"]["unique_tokens"] > arms["baseline"]["unique_tokens"]
    assert "<html" in (tiny_run / "report.html").read_text()


def test_run_lowers_the_training_loss_of_every_model(tiny_run: Path) -> None:
    for stage in ("train/baseline", "train/sbp", "train/oracle", "tune/related"):
        losses = [loss for _, loss in read_curve(tiny_run / stage / "metrics.jsonl", "train/loss")]
        assert losses[-1] < losses[0]


def test_finished_run_is_not_run_again(tiny_config: RunConfig, tiny_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for stage in STAGES for path in (tiny_run / stage).rglob("*")}
    run(tiny_config, tiny_run, console=QUIET)
    assert before == {path: path.stat().st_mtime_ns for stage in STAGES for path in (tiny_run / stage).rglob("*")}


def test_changed_configuration_is_refused_and_force_reruns_only_affected_stages(
    tiny_config: RunConfig, tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(tiny_run, out)
    before = fingerprints(out)
    changed = load_config(["small"], [*TINY, "arms.sbp.share=0.1"])
    with pytest.raises(UserError, match=r"arms.sbp.share: 0.375 -> 0.1.*--out"):
        run(changed, out, console=QUIET)
    assert fingerprints(out) == before
    run(changed, out, console=QUIET, force=True)
    after = fingerprints(out)
    assert {stage for stage in STAGES if after[stage] != before[stage]} >= {"train/sbp", "evaluate/sbp", "compare"}
    assert {stage for stage in STAGES if after[stage] == before[stage]} >= {
        *("prepare", "embed", "pair/related", "synthesize/related", "filter/related", "quality/related"),
        *("train/baseline", "train/oracle", "tune/related", "evaluate/baseline", "evaluate/oracle"),
    }


def test_run_with_known_pairs_searches_none_and_writes_its_report(tiny_run: Path, tmp_path: Path) -> None:
    pairs, ids = PairSet(tiny_run / "pair/related"), PreparedCorpus(tiny_run / "prepare").unique.ids
    lines = [
        json.dumps({"seed": ids[seed], "partner": ids[partner]})
        for seed, partner in zip(pairs.seeds, pairs.partners, strict=True)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    out = tmp_path / "run"
    for stage in ("prepare", "train/baseline", "train/oracle"):
        shutil.copytree(tiny_run / stage, out / stage)
    shutil.copy(tiny_run / "config.toml", out)
    run(load_config(["small"], [*TINY, f"pair.file={tmp_path / 'pairs.jsonl'}"]), out, console=QUIET, force=True)
    assert not (out / "embed").exists() and not (out / "quality").exists()
    assert len(PairSet(out / "pair/related")) == len(pairs)
    page = (out / "report.html").read_text()
    assert "Sources of synthetic documents" in page and "Related pairs" not in page


def test_run_until_a_stage_then_the_rest_side_by_side_gives_the_same_results(
    tiny_config: RunConfig, tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    assert run(tiny_config, out, console=QUIET, until="pair/related", side_by_side=2) is None
    assert {str(path.parent.relative_to(out)) for path in out.rglob("manifest.json")} == {"prepare", "embed", "pair/related"}
    run(tiny_config, out, console=QUIET, side_by_side=2)
    assert fingerprints(out) == fingerprints(tiny_run)
    assert results(out) == results(tiny_run)


def test_run_until_an_unknown_stage_names_those_that_there_are(tiny_config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--until pear: no stage of this run; its stages: prepare, train/baseline"):
        run(tiny_config, tmp_path / "other", console=QUIET, until="pear")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("kills", "seed"), [pytest.param(1, 0, id="once"), pytest.param(12, 1, marks=pytest.mark.slow, id="twelve-times")]
)
def test_run_killed_at_random_ends_with_the_same_results(kills: int, seed: int, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "sbp_fast", "run", "small", *TINY, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    moments = random.Random(seed)
    for _ in range(kills):
        begun = len(list(out.rglob("manifest.json")))
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and len(list(out.rglob("*.partial"))) == 0:
            time.sleep(0.05)  # counting from when it works, not from when it starts to import
        time.sleep(moments.uniform(0, 6))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert len(list(out.rglob("manifest.json"))) >= begun
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert fingerprints(out) == fingerprints(tiny_run)
    assert results(out) == results(tiny_run)
    assert not list(out.rglob("*.partial")) + list(out.rglob("*.tmp"))
