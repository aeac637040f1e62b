"""`sbp-fast plan`: stages, costs, what fits, and that it takes nothing but arithmetic."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sbp_fast.cli import app
from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError
from sbp_fast.experiment.costs import QWEN, CorpusEstimate, Cost, key_value_bytes
from sbp_fast.experiment.graph import stages_of
from sbp_fast.experiment.plan import tables as plan
from sbp_fast.experiment.plan.fit import needs, smallest_change, with_checkpointing
from sbp_fast.model.flops import forward_flops, parameters, training_flops
from sbp_fast.train.memory import usable_memory

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.toml"))
SMALL = ["pretrain.tokens_per_step=1024", "pretrain.microbatch_tokens=512"]
SMALL += ["synthesizer.tokens_per_step=4096", "synthesizer.microbatch_tokens=1024"]


def fits(config: RunConfig, gpus: int) -> bool:
    return all(need.fits("h100") for need in needs(config, gpus))


def stage(config: RunConfig, name: str) -> Cost:
    return plan.stage_costs(config)[name]


@pytest.mark.parametrize("name", SHIPPED)
def test_plan_of_a_shipped_configuration_fits_with_default_options(name: str) -> None:
    result = CliRunner().invoke(app, ["plan", name])
    assert result.exit_code == 0, result.output
    lines, stages = result.output.splitlines(), stages_of(load_config([name]))
    assert lines[-1].startswith("Fits: pretrain ") and "not measured" in result.output
    printed = [line.split()[0].rstrip("…") for line in lines if line.strip()]  # long names are shortened
    shown = {stage: sum(stage.startswith(word) and len(word) >= min(len(stage), 15) for word in printed) for stage in stages}
    assert min(shown.values()) >= 2, shown  # its time and its disk
    assert max(len(line) for line in lines[:-1] if not line.startswith("Beside its final run")) <= 80


def test_plan_does_not_import_torch() -> None:
    code = "from sbp_fast.experiment.plan.tables import *; from sbp_fast.config.files import *; import sys\n"
    code += "plan_tables(load_config(['3b-1t']), 64, 'h100'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h300"], "choose from a100, h100, h200, b200"),
        (["--gpus", "12"], "parallel.shard_processes: 8 does not divide the 12 processes"),
        (["pretrain.microbatch_tokens=5000"], "pretrain: tokens_per_step = 8388608 is no multiple of microbatch_tokens = 5000"),
        (["pretrain.microbatch_tokens=2048"], "pretrain.microbatch_tokens: 2048 is less than 1 times model.context"),
        (["synthesizer.microbatch_tokens=4096"], "raise it to 8192 or more"),
        (
            ["synthesizer.microbatch_tokens=10000"],
            "synthesizer: tokens_per_step = 16777216 is no multiple of microbatch_tokens = 10000",
        ),
    ],
)
def test_plan_of_impossible_settings_is_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", "3b-1t", *arguments])
    assert isinstance(result.exception, UserError) and message in str(result.exception)


def test_plan_of_an_added_arm_has_a_line_for_each_of_its_stages() -> None:
    config = load_config(["demo"], ["arms.decayed={recipe={tokens=2_000_000}, seeds=[0, 1]}"])
    costs = plan.stage_costs(config)
    assert {"train/decayed", "train/decayed-seed-1", "evaluate/decayed", "evaluate/decayed-seed-1"} < costs.keys()
    assert costs["train/decayed"].flops == pytest.approx(2 * costs["train/baseline"].flops, rel=0.01)


@pytest.mark.parametrize(
    ("name", "unique", "everything", "synthetic"),
    [("3b-200b", 10e9, 200e9, 75e9), ("3b-1t", 50e9, 482e9, 125e9), ("6b-1t", 50e9, 482e9, 250e9)],
)
def test_configurations_of_the_paper_have_its_token_budgets(
    name: str, unique: float, everything: float, synthetic: float
) -> None:
    config = load_config([name])
    corpus = CorpusEstimate.guess(config)
    assert corpus.document_tokens == corpus.visible == 828
    assert corpus.unique_tokens == pytest.approx(unique, rel=1e-4)  # a whole number of steps
    assert corpus.tokens == pytest.approx(everything, rel=1e-3)
    assert stage(config, "filter/related").disk == pytest.approx(2 * synthetic, rel=1e-4)
    assert stage(config, "synthesize/related").tokens == pytest.approx(1.25 * synthetic, rel=1e-4)


def test_corpus_estimate_follows_the_configuration() -> None:
    guess = CorpusEstimate.guess(
        load_config(["demo"], ["corpus.passage_characters=1000", "pretrain.tokens=102400", "model.context=256"])
    )
    assert (guess.document_tokens, guess.visible) == (250, 128)  # four characters a token; half a context at most
    assert guess.tokens == pytest.approx(102_400 / 20 / 0.2, rel=0.02)  # a whole number of steps
    assert CorpusEstimate.guess(load_config(["demo"], ["corpus.maximum_documents=10"])).tokens == 10 * 512
    assert guess.heldout_tokens == 0.04 * guess.tokens


def test_training_flops_of_the_plan_equal_those_of_the_trainer() -> None:
    config = load_config(["3b-1t"])
    tokens = 119_209 * 8_388_608
    assert stage(config, "train/baseline").flops == training_flops(config.model, 49_152, tokens, tokens * 828, tokens)
    tuned = 2980 * 16_777_216  # of nine documents with one seed eight carry loss, and see the seed too
    assert stage(config, "tune/related").flops == training_flops(
        config.model, 49_152, tuned, tuned * (828 + 828 * 8 / 9), tuned * 8 / 9
    )


def test_gpu_hours_follow_from_flops_or_memory_traffic() -> None:
    assert Cost(0, flops=989.4e12 * 3600).gpu_hours("h100", 0.4) == 2.5
    assert Cost(0, flops=989.4e12, moved=3.35e12 * 7200).gpu_hours("h100", 0.5) == 4
    config = load_config(["3b-1t"], ["synthesize.batch_documents=100", "synthesize.samples_per_seed=4"])
    assert key_value_bytes(config.model) == 26 * 2 * 8 * 128 * 2
    multiplied = parameters(config.model, 49_152) - 26 * 2 * (3072 + 128) - 3072
    written = stage(config, "synthesize/related")
    read = 2 * multiplied / 100 + key_value_bytes(config.model) * (828 / 4 + 828)
    assert written.moved == pytest.approx(written.tokens * read, rel=1e-12)
    assert written.gpu_hours("h100", 1) == written.moved / 3.35e12 / 3600


def test_costs_of_embed_and_pair_are_proportional_to_documents() -> None:
    config = load_config(["3b-200b"], ["embed.maximum_tokens=512"])
    corpus = CorpusEstimate.guess(config)
    documents, embedded = corpus.unique_documents, corpus.unique_documents + corpus.heldout_documents
    assert corpus.heldout_documents == pytest.approx(0.0005 * documents / config.corpus.unique_share)
    embed, pair = stage(config, "embed"), stage(config, "pair/related")
    assert embed.flops == embedded * 512 * (2 * 440_467_456 + 4 * 28 * 2048 * 512)
    assert embed.disk == embedded * (2 * 1024 + 8) and pair.disk == pytest.approx(
        documents * (8 * 12 + 200 * (3 * 8 + 20 + 21))
    )
    assert f"{(documents * 70 + 1e6 * 12 * 1024) / 2**30:,.0f} GiB of memory" in pair.disk_content
    assert stage(load_config(["3b-200b"], ["embed.maximum_tokens=512", "embed.model=other"]), "embed") == embed
    assert config.embed.model == QWEN
    hashing = CorpusEstimate.guess(config).unique_tokens / 40e6
    assert pair.core_seconds == pytest.approx(documents * 3 * 2 * 1024 * 34 * 1000 / 22e9 + hashing)
    graph = stage(load_config(["3b-200b"], ["pair.backend=hnsw", "pair.partition_documents=100_000_000"]), "pair/related")
    assert graph.core_seconds == pytest.approx(documents * 1.24e-3 * 1024 / 384 + hashing)
    shorter = stage(load_config(["3b-200b"], ["embed.dimensions=256", "embed.storage=int8"]), "embed")
    assert shorter.disk == embedded * (256 + 8)


def test_cost_of_relation_is_that_of_its_forward_passes() -> None:
    for name, documents in (("demo", None), ("3b-200b", 4096)):
        config = load_config([name])
        corpus = CorpusEstimate.guess(config)
        count, length = documents or corpus.heldout_documents / 2, corpus.document_tokens
        pairs = 8 * count  # as the cap allows
        read, scored = (2 * pairs + 2 * count) * length, (2 * pairs + count) * length
        visible = read * corpus.visible + 2 * pairs * length**2  # partners see their seeds
        cost = stage(config, "relation/related")
        assert cost.flops == pytest.approx(forward_flops(config.model, config.corpus.vocabulary_size, read, visible, scored))
        assert (cost.tokens, cost.disk) == (pytest.approx(read), pairs * 56)


def test_disk_of_the_plan_counts_shards_checkpoints_and_weights() -> None:
    config = load_config(["3b-200b"], ["checkpoint.keep=3", "checkpoint.keep_every_steps=1000"])
    count = parameters(config.model, 49_152)
    assert stage(config, "train/baseline").disk == (3 + 23) * 12 * count + 4 * count  # 23,842 steps
    assert stage(config, "train/baseline").disk_content == "the weights, and as it runs 26 checkpoints"
    assert (
        stage(load_config(["3b-200b"], ["corpus.vocabulary_size=70000"]), "prepare").disk == 2 * stage(config, "prepare").disk
    )
    muon = stage(load_config(["3b-200b"], ["pretrain.optimizer=muon"]), "train/baseline").disk
    matrices = count - 49_152 * 3072 - 26 * 2 * (3072 + 128) - 3072
    assert muon == stage(load_config(["3b-200b"]), "train/baseline").disk - 2 * 4 * matrices


def test_overhead_counts_the_stages_that_only_sbp_needs() -> None:
    config = RunConfig()
    costs = dict.fromkeys(stages_of(config), Cost(0, flops=0))
    costs |= {"train/baseline": Cost(0, flops=100), "train/sbp": Cost(0, flops=100), "train/oracle": Cost(0, flops=1000)}
    costs |= {"prepare": Cost(0, flops=1000), "embed": Cost(0, flops=1), "synthesize/related": Cost(0, flops=11)}
    (line,) = plan.overheads(config, costs, "h100")
    assert "SBP takes 12% of a baseline run's FLOPs and 12% of its GPU hours" in line


# --- what fits ---


@pytest.mark.parametrize(
    ("name", "gpus", "settings", "changes"),
    [
        ("3b-1t", 8, [], []),
        ("3b-1t", 1, [], ["parallel.activation_checkpointing=selective"]),
        ("6b-1t", 2, [], ["parallel.activation_checkpointing=full"]),
        (
            "3b-1t",
            1,
            ["pretrain.microbatch_tokens=262144", "parallel.activation_checkpointing=full"],
            ["pretrain.microbatch_tokens=65536"],
        ),
        ("6b-1t", 1, [], ["parallel.activation_checkpointing=full", "--gpus 2"]),
        ("6b-1t", 1, ["parallel.shard_processes=1"], None),
        ("demo", 8, SMALL, ["--gpus 2"]),
    ],
)
def test_smallest_change_makes_training_fit(name: str, gpus: int, settings: list[str], changes: list[str] | None) -> None:
    settings = [*settings, *([] if "parallel.shard_processes=1" in settings else ["parallel.shard_processes=0"])]
    config = load_config([name], settings)
    assert smallest_change(config, gpus, "h100") == changes
    verdict = plan.verdict(config, gpus, "h100")
    if changes == []:
        assert verdict.startswith("Fits: ") and fits(config, gpus)
    else:
        assert verdict.startswith("Does not fit: ") and not fits(config, gpus)
        assert verdict.endswith(
            f"This does: {' '.join(changes)}" if changes else "Neither these settings nor more GPUs make it fit."
        )
    if changes:  # as a user would type them
        number = next((int(change.split()[1]) for change in changes if change.startswith("--gpus")), gpus)
        typed = [change for change in changes if not change.startswith("--gpus")]
        keys = {change.partition("=")[0] for change in typed}
        others = [setting for setting in settings if setting.partition("=")[0] not in keys]
        assert fits(load_config([name], [*others, *typed]), number)


def test_plan_with_fewer_microbatches_than_gpus_names_them() -> None:
    verdict = plan.verdict(load_config(["demo"], SMALL), 4, "h100")
    assert "pretrain has 2 microbatches a step for 4 GPUs" in verdict


def test_plan_shows_memory_of_every_choice_and_measured_peaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["3b-1t"])
    need = needs(config, 16)[0]
    assert (need.section, need.microbatches, need.gpus) == ("pretrain", 512, 16)
    shown = CliRunner().invoke(app, ["plan", "3b-1t", "--gpus", "16"]).output
    totals = [needs(with_checkpointing(config, choice), 16)[0].memory.total / 2**30 for choice in ("none", "selective", "full")]
    row = next(line.split() for line in shown.splitlines() if line.strip().startswith("all") and line.count(".") == 6)
    assert row[1:4] == [f"{total:.1f}" for total in totals]
    assert f"{usable_memory('h100') / 2**30:.1f} GiB usable on each of 16 H100" in shown

    shape: dict[str, Any] = {
        "model": config.model.model_dump(mode="json"),
        "vocabulary_size": 49_152,
        "microbatch_tokens": 16_384,
        "microbatches": 32,
        "optimizer": "adamw",
        "parallel": config.parallel.model_dump(mode="json"),
        "gpus": 16,
    }
    other = {"shape": shape | {"gpus": 8}, "peak_memory_bytes": 1}
    record = {
        "environment": {"device": "NVIDIA H100 80GB HBM3"},
        "cases": [other, {"shape": shape, "peak_memory_bytes": 50 << 30}],
    }
    (tmp_path / "nvidia-h100").mkdir()
    (tmp_path / "nvidia-h100" / "training.json").write_text(json.dumps(record))
    assert plan._measured(config, need, "h100", tmp_path) == "measured: 50.0 GiB"
    assert plan._measured(config, need, "h200", tmp_path) == "not measured"
    assert plan._measured(config, needs(config, 24)[0], "h100", tmp_path) == "not measured"
