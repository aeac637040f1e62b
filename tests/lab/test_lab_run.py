"""The lab from worlds to page, with models that learn nothing in a few steps, and what its intervals say."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.lab.metrics import EXCESS, EXCESS_LINKED
from sbp_fast.lab.page import write_page
from sbp_fast.lab.results import CONTROLS, interval, sentences, summarize
from sbp_fast.lab.run import lab_runs, run_lab
from sbp_fast.lab.sweeps import LABELS, SHARE, TOKENS, Sweep
from sbp_fast.lab.world_run import FIGURES, run_world
from sbp_fast.lab.worlds import WorldSettings

STEPS = ("pretrain.tokens=4608", "synthesizer.tokens=9216")
SMALL = {"concepts": 48, "oracle_ratio": 3}


def test_a_world_goes_through_the_stages_and_its_figures_are_theirs(tmp_path: Path) -> None:
    left_out = [f"arms.{arm}.enabled=false" for arm in ("oracle", "random-pairs", "unconditional", "repetition-decay-1",
                                                        "repetition-decay-3")]  # fmt: skip
    run = replace(lab_runs(tmp_path, [3], (*STEPS, *left_out), SMALL)[0], quiet=True)
    figures = run_world(run)
    assert set(figures["arms"]) == {"baseline", "sbp"} and figures["world"]["seed"] == 3
    manifests = {path.parent.relative_to(run.directory).as_posix() for path in run.directory.rglob("manifest.json")}
    assert manifests == {"prepare", "pair/related", "tune/related", "synthesize/related", "filter/related",
                         "train/baseline", "train/sbp", "evaluate/baseline", "evaluate/sbp"}  # fmt: skip
    scores = pq.read_table(run.directory / "evaluate/sbp/scores.parquet").to_pylist()
    test = PreparedCorpus(run.directory / "prepare").test
    ids = set(PreparedCorpus(run.directory / "prepare").heldout.ids[test].tolist())
    rows = [row for row in scores if row["metric"] == EXCESS and row["id"] in ids]
    excess = sum(row["numerator"] for row in rows) / sum(row["denominator"] for row in rows)
    assert figures["arms"]["sbp"][EXCESS]["test"] == pytest.approx(excess, rel=1e-12)
    assert figures["samples"]["related"]["documents"] > 100
    assert json.loads((run.directory / FIGURES).read_text()) == figures


@pytest.mark.slow
def test_lab_writes_results_and_page_and_does_nothing_twice(tmp_path: Path) -> None:
    page = run_lab(tmp_path, [0], STEPS, SMALL, processes=1, quiet=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["worlds"]) == {"two-names", "shared-name"}
    for kind, world in results["worlds"].items():
        figures = json.loads((tmp_path / kind / "seed-0" / FIGURES).read_text())
        for arm, values in figures["arms"].items():
            assert world["arms"][arm]["excess"]["seeds"] == [values[EXCESS]["test"]]
            assert world["arms"][arm]["excess_linked"]["value"] == values[EXCESS_LINKED]["test"]
        best = min((figures["arms"][arm][EXCESS] for arm in figures["arms"] if arm.startswith(("baseline", "repetition"))),
                   key=lambda excess: excess["validation"])  # fmt: skip
        assert world["arms"]["repetition-tuned"]["excess"]["value"] == best["test"]
        assert world["synthesizer"]["conditional"]["value"] == figures["synthesizers"]["related"]["conditional"]
        assert world["arms"]["sbp"]["excess"]["low"] is None and not world["ahead"]
        assert f'<section id="{kind}">' in page.read_text() and "One seed: figures" in page.read_text()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")}
    run_lab(tmp_path, [0], STEPS, SMALL, processes=1, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")} == before
    with pytest.raises(UserError, match="holds another run"):
        run_lab(tmp_path, [0], ("pretrain.tokens=9216", STEPS[1]), SMALL, processes=1, quiet=True)


def test_a_seed_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="twice"):
        run_lab(tmp_path, [1, 1])


def figures(kind: str, seed: int, excess: dict[str, float]) -> dict[str, Any]:
    both = {
        arm: {name: {"test": value, "validation": value} for name in (EXCESS, EXCESS_LINKED)} for arm, value in excess.items()
    }
    learnt = {"conditional": 0.5, "exact": 0.48, "entropy": 0.26, "uniform": 2.08, "pairs": 100}
    samples = {"well_formed": 1.0, "kept_name": None, "missing_kind": 0.1, "missing_right_values": 0.9, "chance": 0.125}
    return {
        "world": {"kind": kind, "seed": seed, "concepts": 256, "linked": 0.6, "noise": 0.05},
        "bounds": {"entropy": 0.26, "knowing_nothing": 1.8, "one_telling": 0.2, "two_tellings": 0.06},
        "arms": both,
        "synthesizers": {"related": learnt, "random": learnt | {"conditional": 1.0}},
        "samples": dict.fromkeys(("related", "random", "unconditional"), samples),
        "seconds": 1.0,
    }


def results_of(kind: str, **excess: list[float]) -> dict[str, Any]:
    arms = {"baseline": [6.0, 6.1, 6.2], "random-pairs": [2.5, 2.6, 2.7], "unconditional": [4.0, 4.2, 4.4], "oracle": [0.2] * 3}
    arms |= {name.replace("_", "-"): values for name, values in excess.items()}
    config = lab_runs(Path("out"), [0])[0].config
    return summarize([figures(kind, n, {arm: values[n] for arm, values in arms.items()}) for n in range(3)], config)


def test_sbp_ahead_by_intervals_that_do_not_touch_is_said() -> None:
    results = results_of("two-names", sbp=[0.5, 0.6, 0.7])
    assert results["worlds"]["two-names"]["ahead"] == list(CONTROLS)
    sentence = sentences(results)["two-names"]
    assert sentence == (
        "SBP is ahead of Tuned repetition, Random pairs and Unconditional: the intervals over 3 seeds do not touch."
    )


def test_touching_intervals_give_no_conclusion() -> None:
    results = results_of("two-names", sbp=[0.5, 0.6, 4.0])
    assert results["worlds"]["two-names"]["ahead"] == [] and "ahead" not in sentences(results)["two-names"]
    assert "no conclusion" in sentences(results)["two-names"]


@pytest.mark.parametrize(("sbp", "expected"), [([4.0, 4.3, 4.3], "not told apart"), ([1.0, 1.1, 1.2], "SBP is ahead")])
def test_the_shared_name_compares_sbp_with_unconditional(sbp: list[float], expected: str) -> None:
    assert expected in sentences(results_of("shared-name", sbp=sbp))["shared-name"]


def test_interval_over_three_seeds_is_students() -> None:
    measured = interval([1.0, 2.0, 3.0], 0.95)
    assert measured["value"] == 2 and measured["high"] - 2 == pytest.approx(4.302652729911275 / 3**0.5, rel=1e-9)


def test_gate_is_passed_within_a_tenth_of_the_exact_loss() -> None:
    world = results_of("two-names", sbp=[0.5, 0.6, 0.7])["worlds"]["two-names"]
    assert world["synthesizer"]["passed"] and not world["random_synthesizer"]["passed"]


def test_page_draws_every_arm_with_its_interval(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results_of("two-names", sbp=[0.5, 0.6, 0.7])))
    page = write_page(tmp_path).read_text()
    assert page.count('class="interval"') == page.count('class="value"') == 6  # and the tuned repetition
    assert "0.600 [" in page and "told once" in page


def point(value: float, excess: list[float], bounds: Mapping[str, float]) -> dict[str, Any]:
    losses = {name: interval([0.5] * len(excess), 0.95) for name in ("conditional", "exact")}
    return {"value": value, "excess": interval(excess, 0.95), **losses, "bounds": bounds}


def test_page_draws_every_value_of_a_sweep_with_the_bounds_that_do_not_change(tmp_path: Path) -> None:
    results = results_of("two-names", sbp=[0.5, 0.6, 0.7])
    bounds = results["worlds"]["two-names"]["bounds"]
    results["sweeps"] = {
        "linked": [point(value, [0.5, 0.6, 0.7], bounds) for value in (0.3, 0.6)],
        "noise": [point(value, [0.5], {**bounds, "knowing_nothing": 1.8 - value}) for value in (0.0, 0.2)],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = write_page(tmp_path).read_text()
    linked, noise = page.split('<section id="sweep-')[1:]
    assert linked.count('class="value"') == linked.count('class="interval"') == 2 and linked.count('class="bound"') == 3
    assert noise.count('class="value"') == 2 and 'class="interval"' not in noise and noise.count('class="bound"') == 2
    assert "<td>1.600</td>" in noise and 'href="#sweep-noise"' in page
    assert '<th scope="row">0</th>' in noise and 'text-anchor="end">knowing nothing</text>' in linked


def test_every_setting_that_can_be_swept_is_one_of_the_world_or_of_sbp() -> None:
    assert {*LABELS} - {SHARE, TOKENS} <= {field.name for field in fields(WorldSettings)}


@pytest.mark.parametrize(
    "text", ["kind=1", "linked", "linked=1.0", "noise=0.1,0.1", "share=a", "share=nan", "tokens=0", "tokens=0.5"]
)
def test_an_unusable_sweep_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--sweep"):
        Sweep.parse(text)


@pytest.mark.parametrize("text", ["linked=0.3,0.6", "noise=0.05", "share=0.7"])
def test_a_sweep_of_a_value_that_the_worlds_have_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is what the lab's own worlds have"):
        Sweep.parse(text).runs(tmp_path, [0], (), {})


def test_a_sweep_runs_a_world_for_each_value_and_seed_and_shares_documents_among_shares(tmp_path: Path) -> None:
    linked = Sweep.parse("linked=0.9,0.3").runs(tmp_path, [0, 1], STEPS, SMALL)
    assert [run.label for run in linked] == ["linked-0.3/seed-0", "linked-0.3/seed-1", "linked-0.9/seed-0", "linked-0.9/seed-1"]
    assert {run.world.linked for run in linked} == {0.3, 0.9} and {run.world.concepts for run in linked} == {48}
    share = Sweep.parse("share=0.35,0.9")
    runs = share.runs(tmp_path, [0, 1], STEPS, SMALL)
    assert [run.label for run in runs] == ["share/seed-0", "share/seed-1"]
    assert [name for name, arm in runs[0].config.arms.items() if arm.enabled] == ["sbp-share-35", "sbp-share-90", "oracle"]
    names = ("sbp-share-35", "sbp-share-90")
    measured = [
        {
            "arms": {name: {EXCESS: {"test": seed + index}} for index, name in enumerate(names)},
            "bounds": {"entropy": 0.2},
            "synthesizers": {"related": {"conditional": 0.3 * seed, "exact": 0.2}},
        }
        for seed in (1.0, 2.0)
    ]
    points = share.points(runs, measured, 0.95)
    assert [(point["value"], point["excess"]["seeds"]) for point in points] == [(0.35, [1.0, 2.0]), (0.9, [2.0, 3.0])]
    assert points[0]["conditional"]["seeds"] == pytest.approx([0.3, 0.6]) and points[0]["exact"]["seeds"] == [0.2, 0.2]


def test_a_sweep_over_the_synthesizers_tokens_changes_these_alone(tmp_path: Path) -> None:
    runs = Sweep.parse("tokens=2304,1152000").runs(tmp_path, [0], STEPS, SMALL)
    assert [run.label for run in runs] == ["tokens-2304/seed-0", "tokens-1152000/seed-0"]
    assert [run.config.synthesizer.tokens for run in runs] == [2304, 1152000] and {run.world for run in runs} == {runs[0].world}
