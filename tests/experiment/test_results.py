import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from fabricated_counts import METRICS, comparison
from fabricated_run import CONFIG, write_run

from sbp_fast.errors import UserError
from sbp_fast.experiment.arms import arms_of
from sbp_fast.experiment.graph import stages_of
from sbp_fast.experiment.ledger import stages_of_arm
from sbp_fast.experiment.report import wording
from sbp_fast.experiment.results import collect, write_results
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.seals import read_sealed_json, write_sealed_json


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("results") / "run")


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if "seconds" not in key}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def test_collect_copies_the_arms_numbers_from_the_manifests(run: Path) -> None:
    results = collect(run)
    arms, measured = results["arms"], comparison()
    assert results["run"]["config"] == CONFIG.model_dump(mode="json")
    for arm in ("baseline", "sbp", "oracle"):
        assert arms[arm]["tokens"] == 983_040 and arms[arm]["parameters"] == 1_262_976
        for metric, score in measured["arms"][arm].items():
            assert arms[arm][metric] == score
        assert arms[arm]["difference_to_baseline"] == measured["differences"].get(arm, {})
        assert arms[arm]["difference_to"] == measured["pairwise"].get(arm, {})
    assert arms["sbp"]["synthetic_tokens"] == 300_000 and arms["baseline"]["synthetic_tokens"] == 0
    corpus = results["corpus"]
    assert arms["oracle"]["unique_tokens"] == corpus["tokens"] > corpus["unique_tokens"] == arms["sbp"]["unique_tokens"]


def test_arms_have_the_held_out_losses_of_their_training(run: Path, tmp_path: Path) -> None:
    loss = 8.2 - 119 / 60
    curve = [{"step": step, "tokens": 8192 * (step + 1), "bits_per_byte": 4.1 - step / 120} for step in (39, 79, 119)]
    assert collect(run)["arms"]["sbp"]["validation"] == {
        "selected_step": 120,
        "loss": loss,
        "last_loss": loss,
        "tokens": 8100,
        "curves": {"sbp": curve, "sbp-seed-1": curve, "sbp-seed-2": curve},
    }
    shutil.copytree(run, tmp_path / "run")
    manifest = tmp_path / "run" / "train" / "oracle" / "manifest.json"
    values = read_sealed_json(manifest, "")
    del values["counts"]["validation_loss"]  # as with validation.points = 0
    write_sealed_json(manifest, values)
    assert collect(tmp_path / "run")["arms"]["oracle"]["validation"] == {}


def test_totals_are_the_same_bits_in_every_process(run: Path) -> None:
    """The stages that an arm needs are a set, whose order depends on the process."""
    stages, results = stages_of(CONFIG), collect(run)
    for arm in arms_of(CONFIG).values():
        manifests = [Manifest.read(run / name) for name in sorted(stages_of_arm(stages, arm))]
        seconds = [manifest.seconds for manifest in manifests]
        assert results["arms"][arm.name]["total_seconds"] == math.fsum(seconds)


def test_unique_tokens_read_are_capped_at_the_available_ones(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    manifest = tmp_path / "run" / "train" / "oracle" / "manifest.json"
    values = read_sealed_json(manifest, "")
    values["counts"]["sources"]["real"] = {"tokens": 1_000, "epochs": 0.3}
    write_sealed_json(manifest, values)
    arms = collect(tmp_path / "run")["arms"]
    assert arms["oracle"]["unique_tokens_read"] == 1_000 < arms["oracle"]["unique_tokens"]
    assert arms["baseline"]["unique_tokens_read"] == arms["baseline"]["unique_tokens"]


def runs_of(stage: str) -> list[str]:
    """The stages of the three training runs of an arm."""
    return [stage, f"{stage}-seed-1", f"{stage}-seed-2"]


def test_ledger_counts_every_stage_that_an_arm_needs(run: Path) -> None:
    results = collect(run)
    arms = results["arms"]
    needed = 9.1e12 + 1.4e13 + 2.2e12 + 3.3e12 + 9.2e12  # baseline, embed, synthesizer, synthesize, sbp
    assert arms["sbp"]["total_flops"] == pytest.approx(needed, rel=1e-12)
    assert arms["sbp"]["training_flops"] == 9.2e12
    assert arms["baseline"]["total_flops"] == arms["baseline"]["training_flops"] == 9.1e12
    assert results["matched"]["end_to_end"]["sbp"]["baseline_tokens"] == round(983_040 * needed / 9.1e12)
    ledger = results["ledger"]
    assert [line["stage"] for line in ledger] == [
        *("prepare", *runs_of("train/baseline"), "embed", "pair/related", "tune/related"),
        *(
            "synthesize/related",
            "filter/related",
            *runs_of("train/sbp"),
            *runs_of("train/oracle"),
            "quality/related",
            "relation/related",
        ),
        *(*runs_of("evaluate/baseline"), *runs_of("evaluate/sbp"), *runs_of("evaluate/oracle"), "compare"),
    ]
    assert sum(line["share_of_flops"] for line in ledger) == pytest.approx(1)
    assert sum(line["share_of_seconds"] for line in ledger) == pytest.approx(1)
    trained, evaluated = 9.1e12 + 9.2e12 + 9.15e12, 9 * 0.7e12
    assert results["totals"]["flops"] == pytest.approx(needed + 9.15e12 + 2 * trained + evaluated + 0.4e12 + 0.2e12)


def test_results_of_the_same_run_are_the_same(run: Path, tmp_path: Path) -> None:
    first = write_results(run)
    text = (run / "results.json").read_text()
    assert json.loads(text) == first
    write_results(run)
    assert (run / "results.json").read_text() == text
    again = collect(write_run(tmp_path / "again"))
    assert without_seconds(again) == without_seconds(first)


def test_collect_of_an_unfinished_or_foreign_directory_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "train" / "sbp")
    with pytest.raises(UserError, match="the stage train/sbp is not finished"):
        collect(tmp_path / "run")
    with pytest.raises(UserError, match="is no run"):
        collect(tmp_path)


@pytest.mark.parametrize(
    ("sbp", "oracle", "verdict", "sentences"),
    [
        (
            -0.021,
            -0.15,
            "improved on",
            [
                "Better in held-out bits per byte: SBP -0.021 [-0.033, -0.009] and Oracle -0.150 [-0.162, -0.138], against the "
                "repetition baseline at the same 983k training tokens.",
                "As a share of the oracle's gain: SBP 14% [6%, 22%].",
            ],
        ),
        (
            0.021,
            -0.15,
            "did worse than",
            ["Worse in held-out bits per byte: SBP +0.021 [+0.009, +0.033], against", "Better", "gain: SBP -14% [-22%, -6%]."],
        ),
        (
            -0.004,
            -0.15,
            "made no measurable difference to",
            ["No measurable difference in held-out bits per byte: SBP -0.004 [-0.016, +0.008], against", "Better"],
        ),
        (
            -0.021,
            -0.01,
            "improved on",
            ["Better", "No measurable difference in held-out bits per byte: Oracle -0.010 [-0.022, +0.002]."],
        ),
    ],
)
def test_headline_claims_only_differences_whose_intervals_exclude_zero(
    sbp: float, oracle: float, verdict: str, sentences: list[str], run: Path
) -> None:
    results, measured = collect(run), comparison(sbp=sbp, oracle=oracle)
    for arm in measured["arms"]:
        results["arms"][arm] |= measured["arms"][arm] | {"difference_to_baseline": measured["differences"].get(arm, {})}
    results["recovered_share_of_oracle"] = measured["recovered_share_of_oracle"]
    assert wording.verdict(results) == f"SBP {verdict} the repetition baseline in this run"
    *claims, caveat = wording.headline(results)
    assert caveat == "Brackets are intervals over training runs (3 an arm) and held-out text together."
    assert len(claims) == len(sentences)
    for sentence, part in zip(claims, sentences, strict=True):
        assert part in sentence.replace(wording.MINUS, "-")
    results["arms"]["sbp"]["tokens"] = 500_000
    assert "at unequal training tokens: baseline 983k, SBP 500k, oracle 983k" in wording.headline(results)[0]


def test_shares_of_the_oracles_gain_are_null_where_the_baseline_repeats_nothing(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    manifest = tmp_path / "run" / "train" / "baseline" / "manifest.json"
    values = read_sealed_json(manifest, "")
    values["counts"]["sources"]["real"]["epochs"] = 1.0
    write_sealed_json(manifest, values)
    shares = collect(tmp_path / "run")["recovered_share_of_oracle"]["oracle"]["sbp"]
    assert shares.keys() == METRICS.keys()
    assert all(share["value"] is None and "read its text once at most" in share["reason"] for share in shares.values())


def test_is_better_takes_higher_accuracy_and_lower_bits() -> None:
    assert wording.is_better({"value": 0.1}, METRICS["capital_accuracy"])
    assert not wording.is_better({"value": 0.1}, METRICS["heldout_bits_per_byte"])
