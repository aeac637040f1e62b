import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError
from sbp_fast.experiment.graph import needed_stages, stages_of

CONTROLS = (
    "arms.baseline-tuned.recipe.weight_decay=[0.1, 1.0]",
    "arms.random-pairs.synthetic=random",
    "arms.unconditional.synthetic=unconditional",
    "arms.related-order.order=related",
    "arms.megadocs.synthetic=megadocs",
    "arms.sbp-round-2.synthetic=round-2",
    "seeds=[0, 1]",
)


def names(*overrides: str) -> set[str]:
    return set(stages_of(load_config(["small"], overrides)))


def test_default_arms_have_one_source() -> None:
    assert list(stages_of(RunConfig())) == [
        "prepare", "train/baseline", "embed", "pair/related", "tune/related", "synthesize/related", "filter/related",
        "train/sbp", "train/oracle", "quality/related", "relation/related", "evaluate/baseline", "evaluate/sbp",
        "evaluate/oracle", "compare",
    ]  # fmt: skip


def test_known_pairs_need_no_vectors() -> None:
    stages = stages_of(load_config(["small"], ["pair.file=pairs.jsonl"]))
    assert names() - set(stages) == {"embed", "quality/related"}
    assert stages["pair/related"].inputs == {"corpus": "prepare"}


def test_without_synthetic_arms_nothing_is_paired() -> None:
    assert names("arms.sbp.enabled=false") == {
        "prepare", "train/baseline", "train/oracle", "evaluate/baseline", "evaluate/oracle", "compare",
    }  # fmt: skip


def test_controls_add_only_what_no_other_arm_needs() -> None:
    assert names(*CONTROLS[:-1]) - names() == {
        "train/baseline-tuned-weight_decay=0.1", "train/baseline-tuned-weight_decay=1.0", "choose/baseline-tuned",
        "evaluate/baseline-tuned",
        "pair/random", "tune/random", "synthesize/random", "filter/random", "quality/random", "relation/random",
        "train/random-pairs", "evaluate/random-pairs",
        "synthesize/unconditional", "filter/unconditional", "train/unconditional", "evaluate/unconditional",
        "stitch/unique", "train/related-order", "evaluate/related-order",
        "stitch/megadocs", "train/megadocs", "evaluate/megadocs",
        "tune/round-2", "synthesize/round-2", "filter/round-2", "quality/round-2", "relation/round-2",
        "train/sbp-round-2", "evaluate/sbp-round-2",
    }  # fmt: skip


def test_another_seed_adds_a_training_run_and_its_scores_for_each_arm() -> None:
    added = names("seeds=[0, 1]") - names("seeds=[0]")
    assert added == {f"{stage}/{arm}-seed-1" for stage in ("train", "evaluate") for arm in ("baseline", "sbp", "oracle")}
    assert names("seeds=[0, 1]", "arms.oracle.seeds=[0]") == names("seeds=[0]") | {
        f"{stage}/{arm}-seed-1" for stage in ("train", "evaluate") for arm in ("baseline", "sbp")
    }


def test_a_sweep_of_shares_generates_once() -> None:
    stages = stages_of(load_config(["small"], ["arms.sbp.share=[0.1, 0.25, 0.5]"]))
    assert [name for name in stages if name.startswith(("synthesize", "filter"))] == ["synthesize/related", "filter/related"]
    readers = [name for name, stage in stages.items() if "synthetic" in stage.inputs and name.startswith("train")]
    assert readers == ["train/sbp-share-10", "train/sbp-share-25", "train/sbp-share-50"]
    arms = stages["synthesize/related"].config.enabled_arms
    assert max(arm.share for arm in arms.values() if arm.synthetic) == 0.5


def test_a_source_that_changes_sampling_shares_pairs_and_synthesizer() -> None:
    added = names("sources.hot.synthesize.temperature=1.2", "arms.hot.synthetic=hot") - names()
    assert added == {"synthesize/hot", "filter/hot", "quality/hot", "train/hot", "evaluate/hot"}


def test_a_synthesizer_that_starts_elsewhere_imports_its_model_once_and_needs_no_arm() -> None:
    model = "sources.related.model=theirs"
    stages = stages_of(load_config(["small"], [model, "sources.random.model=theirs", *CONTROLS[1:2]]))
    assert stages["tune/related"].inputs["start"] == stages["tune/random"].inputs["start"] == "import/related"
    assert stages["import/related"].inputs == {} and "import/random" not in stages
    assert "train/baseline" not in needed_stages(stages, "tune/related")
    assert names(model) - names() == {"import/related"}


@pytest.mark.parametrize("other", ["start=scratch", "start=sbp", "pairs=none"])
def test_a_model_elsewhere_and_another_start_are_refused(other: str) -> None:
    with pytest.raises(UserError, match=r"sources\.mine: model is what a synthesizer starts from, in place of start"):
        load_config(["small"], ["sources.mine.model=theirs", f"sources.mine.{other}"])


def test_names_of_stages_do_not_depend_on_the_arms_that_read_a_source() -> None:
    only = names("arms.sbp.enabled=false", "arms.megadocs.synthetic=megadocs")
    assert {"pair/related", "synthesize/related", "filter/related", "stitch/megadocs"} <= only


def test_what_is_generated_follows_from_the_arms_of_the_same_generation() -> None:
    stages = stages_of(load_config(["small"], ["arms.big.synthetic=random", "arms.big.share=0.9"]))
    arms = stages["synthesize/related"].config.enabled_arms
    assert set(arms) == {"baseline", "sbp"}
    assert set(stages["synthesize/random"].config.enabled_arms) == {"baseline", "big"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["arms.again.synthetic=round-2", "sources.round-2.start=again"], "starts from the arm again, which reads it"),
        (["arms.again.synthetic=round-2", "sources.round-2.start=nobody"], "is no arm that this run trains"),
    ],
)
def test_a_source_that_starts_from_no_earlier_arm_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stages_of(load_config(["small"], overrides))


@given(st.sets(st.sampled_from(CONTROLS)))
def test_every_stage_comes_after_its_inputs_and_leads_to_the_comparison(chosen: set[str]) -> None:
    stages = stages_of(load_config(["small"], sorted(chosen)))
    seen: set[str] = set()
    for name, stage in stages.items():
        assert name == stage.name and set(stage.inputs.values()) <= seen
        seen.add(name)
    measured = {name for name in stages if name.startswith(("quality/", "relation/"))}
    assert needed_stages(stages, "compare") | measured == set(stages)
