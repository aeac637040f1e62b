"""A run whose synthesizer starts from a model that another library made."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import SETTINGS, make_documents
from test_own_model import write_model, write_tokenizer

from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError
from sbp_fast.experiment.costs import CorpusEstimate
from sbp_fast.experiment.dry_run import dry_run_entries
from sbp_fast.experiment.graph import stages_of
from sbp_fast.experiment.plan.fit import needs
from sbp_fast.experiment.run import run
from sbp_fast.model.saved import load_model
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console

pytest.importorskip("transformers")
QUIET = Console(quiet=True)
OTHER_WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "others", "sleep")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A model of transformers with 384 rows and 1,024 positions, and its tokenizer; documents lie beside it."""
    lines = (json.dumps({"id": id, "text": text}) + "\n" for id, text in make_documents(90).items())
    (tmp_path / "documents.jsonl").write_text("".join(lines))
    write_model(tmp_path / "theirs", "Qwen3", 384, max_position_embeddings=1024)
    return tmp_path / "theirs"


def configure(theirs: Path, *overrides: str) -> RunConfig:
    given = (f"corpus.path={theirs.parent}/documents.jsonl", f"corpus.tokenizer={theirs}/tokenizer.json")
    return load_config(["small"], [*SETTINGS, *given, f"sources.related.model={theirs}", *overrides])


def test_a_synthesizer_is_tuned_from_a_model_of_transformers_without_any_arm(theirs: Path, tmp_path: Path) -> None:
    config, out = configure(theirs), tmp_path / "run"
    run(config, out, console=QUIET, until="tune/related")
    imported, tuned = (load_model(out / name) for name in ("import/related", "tune/related"))
    assert tuned.config == imported.config == config.model.model_copy(update=dict(imported.config))
    assert (imported.config.layers, config.model.layers) == (2, 1) and imported.config.context == config.model.context
    manifest = Manifest.load(out / "tune/related")
    assert manifest.inputs["start"] == Manifest.load(out / "import/related").fingerprint
    assert not (out / "train").exists()
    entries = {entry.name: entry.planned.action for entry in dry_run_entries(config, out)}
    finished = {path.parent.relative_to(out).as_posix() for path in out.rglob("manifest.json")}
    assert {name for name, action in entries.items() if action == "skip"} == finished
    write_model(theirs, "Qwen3", 384, max_position_embeddings=1024, rms_norm_eps=1e-5)
    entries = {entry.name: entry.planned.action for entry in dry_run_entries(config, out, force=True)}
    assert (entries["import/related"], entries["pair/related"], entries["tune/related"]) == ("replace", "skip", "run")


@pytest.mark.slow
def test_a_run_with_a_model_of_transformers_trains_its_arms_from_scratch_and_says_what_that_means(
    theirs: Path, tmp_path: Path
) -> None:
    report = run(configure(theirs, "validation.points=0"), tmp_path / "run", console=QUIET)
    assert load_model(tmp_path / "run/train/sbp").config.layers == 1
    results: dict[str, Any] = json.loads((tmp_path / "run/results.json").read_text())
    assert results["sources"]["related"]["start"] == "import:theirs"
    assert str(theirs) not in json.dumps(results["sources"])
    assert {line["stage"]: line["arms"] for line in results["ledger"]}["import/related"] == ["sbp"]
    assert report is not None
    page = " ".join(report.read_text(encoding="utf-8").split())
    assert "The synthesizer of related starts from theirs, a model pretrained elsewhere: what arms gain by its" in page


def test_cost_of_a_synthesizer_is_that_of_the_model_it_starts_from(theirs: Path) -> None:
    config, default = configure(theirs), configure(theirs, "sources.related.model=")
    corpus = CorpusEstimate.guess(config)
    own, foreign = (
        {name: stage.cost(stage.config, corpus) for name, stage in stages_of(which).items()} for which in (default, config)
    )
    for name in ("tune/related", "synthesize/related", "relation/related"):
        assert foreign[name].flops > own[name].flops > 0
    assert foreign["train/sbp"] == own["train/sbp"] and foreign["filter/related"] == own["filter/related"]
    assert 0 < foreign["import/related"].disk < 4 * 384 * 16 * 8
    (own_arm, own_memory), (arm, memory) = ([need.memory.total for need in needs(which, 1)] for which in (default, config))
    assert arm == own_arm and memory > own_memory


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("corpus.tokenizer=train",), "corpus.tokenizer = train: is not that of .*theirs; set it to .*theirs/tokenizer.json"),
        (("corpus.tokenizer={other}",), "other.json: is not that of .*theirs; set it to .*theirs/tokenizer.json"),
        (
            ("model.context=600",),
            "has 1024 positions, too few for a seed and a partner of 600 tokens each; set model.context to",
        ),
        (("sources.related.model={other}.no",), "other.json.no"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_anything_runs(
    overrides: tuple[str, ...], message: str, theirs: Path, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path / "other.json", OTHER_WORDS)
    config = configure(theirs, *(override.format(other=tmp_path / "other.json") for override in overrides))
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_tokenizer_is_refused(theirs: Path, tmp_path: Path) -> None:
    config = configure(theirs, f"corpus.tokenizer={tmp_path}/kept.json")
    (theirs / "tokenizer.json").rename(tmp_path / "kept.json")
    with pytest.raises(UserError, match=r"theirs/tokenizer.json: the tokenizer cannot be read"):
        run(config, tmp_path / "run", console=QUIET)
